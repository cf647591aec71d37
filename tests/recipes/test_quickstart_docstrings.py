"""The docstring task: what is cut out, what is asked, what is dropped."""

import ast
import textwrap

import pytest

from quickstart.corpus import Corpus, Module, read_corpus
from quickstart.docstrings import build_docstring_rows, extract_rows, first_sentence, name_words, remove_docstring

_SOURCE = '''
class Reader:
    @staticmethod
    def read_all(path,
                 limit=None):
        """Read every line of a file.

        More text. """

        # keep this comment
        with open(path) as file:
            return file.readlines()[:limit]

    async def wait(self):
        """Wait until the reader is done."""

    def no_docstring(self):
        return "Return a plain string."

    def one_line(self): "One line with a docstring only."
'''


def test_the_docstring_and_nothing_else_is_removed() -> None:
    rows = {row.name: row for row in extract_rows(Module("reader.py", _SOURCE))}
    assert set(rows) == {"read_all", "wait"}
    assert rows["read_all"].prompt == textwrap.dedent('''\
        def read_all(path,
                     limit=None):
            # keep this comment
            with open(path) as file:
                return file.readlines()[:limit]

        def read_all(path,
                     limit=None):
            """''')
    assert rows["read_all"].completion == "Read every line of a file."
    assert rows["wait"].prompt == 'async def wait(self):\n    pass\n\nasync def wait(self):\n    """'


def test_on_the_library_the_rest_of_each_function_is_unchanged() -> None:
    modules = [
        m
        for m in read_corpus().train
        if m.top_level in ("json", "argparse", "textwrap", "queue", "heapq", "statistics", "http")
    ]
    checked = 0
    for module in modules:
        lines = module.text.splitlines()
        for node in ast.walk(ast.parse(module.text)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            parts = remove_docstring(lines, node)
            texts = [n.value for part in node.body[1:] for n in ast.walk(part) if isinstance(n, ast.Constant)]
            if parts is None or any("\n" in str(text) for text in texts):
                continue  # moving a text of several lines to the margin changes it
            expected = ast.parse(ast.unparse(node)).body[0]
            expected.decorator_list = []
            expected.body = expected.body[1:] or [ast.Pass()]
            assert ast.dump(ast.parse(parts[1]).body[0]) == ast.dump(expected)
            checked += 1
    assert checked > 80


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum. And more.", "Return the sum."),
        ("Return the\n    sum of both\n\nLong text.", "Return the sum of both"),
        ("Return e.g. the sum of both.", "Return e.g. the sum of both."),
        ("Short.", None),
        ("Usage: >>> f(1) gives 2", None),
        ("f(a, b) -> the sum of both", None),
        (" ".join(["word"] * 31), None),
    ],
)
def test_first_sentence(docstring: str, expected: str | None) -> None:
    assert first_sentence(docstring) == expected


def test_held_out_rows_known_from_train_are_dropped() -> None:
    def module(name: str, *sentences: str) -> Module:
        return Module(name, "\n".join(f'def f{i}():\n    """{s}"""\n    return {i}\n' for i, s in enumerate(sentences)))

    corpus = Corpus(
        train=(module("a.py", "Return the first value.", "Close the open file."),),
        held_out=(module("b.py", "return the FIRST value", "Open the closed file.", "Open the closed file."),),
    )
    train, held_out = build_docstring_rows(corpus)
    assert [row.completion for row in train] == ["Return the first value.", "Close the open file."]
    assert [row.completion for row in held_out] == ["Open the closed file.", "Open the closed file."]
    assert {row.name for row in held_out} == {"f1", "f2"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("get_file_name", "get file name"),
        ("getFileName", "get file name"),
        ("HTTPServer", "http server"),
        ("__x__", "x"),
    ],
)
def test_name_words(name: str, words: str) -> None:
    assert name_words(name) == words
