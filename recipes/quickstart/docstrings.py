"""The quickstart's task: a function without its docstring -> the first sentence of that docstring.

    prompt   the source with the docstring cut out, a blank line, the header again, and an opened docstring
    answer   the docstring's first sentence

The header is repeated last so that a prompt cut on the left to the model's length still names the function.
"""

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quickstart.corpus import Corpus, Module

ANSWER_WORDS = range(3, 31)
MAXIMUM_HEADER_LINES = 6
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^a-z])")
_NOT_PROSE = re.compile(r">>>|::|^\W*$|\)\s*->|^\w+\([^)]*\)\s*$")

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class DocstringRow:
    """One example: prompt, answer, and where it is from."""

    prompt: str
    completion: str
    name: str
    module: str


def build_docstring_rows(corpus: Corpus) -> tuple[list[DocstringRow], list[DocstringRow]]:
    """Rows of the train modules and of the held-out modules.

    A held-out row is dropped when its answer, letter case and spacing aside, is also the answer of a train row: a model
    could know it by heart. Repeats inside one side are dropped as well.
    """
    train = _without_repeats(row for module in corpus.train for row in extract_rows(module))
    seen = {_normalised(row.completion) for row in train}
    held_out = _without_repeats(row for module in corpus.held_out for row in extract_rows(module))
    return train, [row for row in held_out if _normalised(row.completion) not in seen]


def extract_rows(module: Module) -> Iterator[DocstringRow]:
    """Every function of a module whose docstring starts with a plain sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in library source are not the user's business
        try:
            tree = ast.parse(module.text)
        except SyntaxError:
            return
    lines = module.text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, _FunctionNode) and (docstring := ast.get_docstring(node)):
            sentence = first_sentence(docstring)
            if sentence is not None and (parts := remove_docstring(lines, node)) is not None:
                header, source = parts
                prompt = f'{source}\n\n{header}\n    """'
                yield DocstringRow(prompt, sentence, node.name, module.name)


def first_sentence(docstring: str) -> str | None:
    """First sentence of the first paragraph on one line; None when it is not prose of a sensible length."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = _END_OF_SENTENCE.split(paragraph)[0]
    if len(sentence.split()) not in ANSWER_WORDS or _NOT_PROSE.search(sentence):
        return None
    return sentence


def remove_docstring(lines: list[str], node: _FunctionNode) -> tuple[str, str] | None:
    """Cut a function out of a file and its docstring out of the function.

    Args:
        lines: Lines of the file.
        node: The function in that file's tree; has a docstring.

    Returns:
        Header (decorators aside, up to the colon) and whole function without docstring, both moved to the left margin;
        None for one-line functions and headers too long for a prompt.
    """
    statement = node.body[0]
    assert statement.end_lineno is not None
    assert node.end_lineno is not None
    header = lines[node.lineno - 1 : statement.lineno - 1]
    if not header or len(header) > MAXIMUM_HEADER_LINES or lines[statement.end_lineno - 1].strip()[-1] not in "\"'":
        return None
    body = lines[statement.end_lineno : node.end_lineno]
    while body and not body[0].strip():
        body = body[1:]
    if not body:  # the docstring was the whole body
        body = [" " * (node.col_offset + 4) + "pass"]
    margin = node.col_offset
    cut = [line[margin:] if not line[:margin].strip() else line for line in header + body]
    while header and not header[-1].strip():
        header = header[:-1]
    return "\n".join(cut[: len(header)]), "\n".join(cut)


def name_words(name: str) -> str:
    """The words a name is made of: `getFile_name` -> `get file name`; the baseline that only reads the name."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name.replace("_", " "))
    return " ".join(spaced.lower().split())


def _without_repeats(rows: Iterable[DocstringRow]) -> list[DocstringRow]:
    kept: dict[tuple[str, str], DocstringRow] = {}
    for row in rows:
        kept.setdefault((row.name, _normalised(row.completion)), row)
    return list(kept.values())


def _normalised(text: str) -> str:
    return " ".join(re.sub(r"\W+", " ", text.lower()).split())
