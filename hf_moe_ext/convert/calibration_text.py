"""Rows of tokens to fit on and rows to measure on, from a text file, a folder of texts or the standard library."""

import os
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Source = str | os.PathLike[str] | Tensor | None

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".text")
_HELD_OUT_ONE_IN = 8
_FEWEST_WORDS = 3
# Long files are cut, so that a sample is of many files rather than of two large ones.
_CHARACTERS_PER_PASSAGE = 16_384
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids, all of one length, without padding.

    Attributes:
        calibration: [rows, length] to fit on.
        held_out: [rows, length] from passages that `calibration` never touches.
        origin: where they come from, for the report.
    """

    calibration: Tensor
    held_out: Tensor
    origin: str


def draw_rows(passages: list[str], tokenizer: Any, num_tokens: int, length: int, seed: int) -> Tensor:
    """Tokens of passages in a random order, joined and cut into rows [rows, length]; at least one row.

    Args:
        passages: texts.
        tokenizer: a Transformers tokenizer; its first or last special token stands between passages.
        num_tokens: how many tokens at most; fewer if the text is shorter.
        length: tokens per row.
        seed: of the order.

    Raises:
        ValueError: less text than one row.
    """
    between = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    order = list(passages)
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    words: set[int] = set()
    for passage in order:
        # Passages are longer than a model's context, and are cut into rows afterwards: no warning of that.
        found = tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        words.update(found)
        ids += between + found
        if len(ids) >= num_tokens:
            break
    rows = min(len(ids), num_tokens) // length
    if rows == 0:
        raise ValueError(
            f"the calibration text gives {len(ids)} tokens (at most {num_tokens} were asked for), less than one row of "
            f"{length}; give more text, or a smaller sequence_length"
        )
    if len(words) < _FEWEST_WORDS:
        # Without its files OLMoE's tokenizer loads all the same, and takes every text for no tokens at all.
        raise ValueError(
            f"the tokenizer makes {len(words)} different tokens of the whole text: its files are missing from the model's "
            "folder, or are another model's; put them there, or pass token ids as calibration (Python)"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids themselves, if they are rows of the model's tokens.

    Raises:
        ValueError: another shape or kind, or ids outside the vocabulary.
    """
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if ids.ndim != 2 or ids.dtype not in kinds or ids.shape[1] < 2 or not len(ids):
        raise ValueError(f"token ids must be integers [rows, length >= 2]; got {tuple(ids.shape)} of {ids.dtype}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(f"token ids must be from 0 to {vocab_size - 1}; got {int(ids.min())} to {int(ids.max())}")
    return ids.to("cpu", torch.long)


def take_rows(ids: Tensor, num_tokens: int, seed: int) -> Tensor:
    """At most so many tokens' rows of ids [rows, length], drawn at random; at least one row."""
    count = min(len(ids), max(1, num_tokens // ids.shape[1]))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return ids[order]


def split_source(source: Source) -> tuple[Tensor | list[str], Tensor | list[str], str]:
    """Part to fit on, part to measure on (an eighth), and the name of the source; ids stay ids, text is passages.

    Raises:
        ValueError: no text, or fewer than two rows of ids.
    """
    if not isinstance(source, Tensor):
        return read_passages(source)
    edge = len(source) - max(1, len(source) // _HELD_OUT_ONE_IN)
    if edge < 1:
        raise ValueError("token ids must be at least 2 rows, because some are held out; got fewer")
    return source[:edge], source[edge:], "token ids"


def read_whole(source: Source) -> tuple[Tensor | list[str], str]:
    """All of a source, nothing held out of it, and its name."""
    if isinstance(source, Tensor):
        return source, "token ids"
    if source is not None and Path(source).is_dir():
        folder = Path(source)
        return [part for path in _list_files(folder) for part in _cut(_read(path))], str(folder)
    fit, measure, origin = read_passages(source)
    return [*fit, *measure], origin


def read_passages(source: str | os.PathLike[str] | None) -> tuple[list[str], list[str], str]:
    """Passages to fit on, passages to measure on, and the name of the source.

    Args:
        source: a text file (split by position), a folder of text files (split by file), or None: the source of the
            Python standard library, which every machine has offline.

    Raises:
        ValueError: no such file or folder, or no text in it.
    """
    if source is not None and Path(source).is_file():
        passages = _cut(Path(source).read_text(encoding="utf-8", errors="replace"))
        if len(passages) == 1:  # a short file: its end is held out
            text = passages[0]
            edge = len(text) - len(text) // _HELD_OUT_ONE_IN
            return [text[:edge]], [text[edge:]], str(source)
        edge = len(passages) - max(1, len(passages) // _HELD_OUT_ONE_IN)
        return passages[:edge], passages[edge:], str(source)
    folder = Path(sysconfig.get_paths()["stdlib"]) if source is None else Path(source)
    if not folder.is_dir():
        raise ValueError(f"calibration: {source} is neither a text file nor a folder of text files")
    files = _list_files(folder)
    if len(files) < 2:
        raise ValueError(
            f"calibration: {folder} holds {len(files)} files ending in {', '.join(TEXT_SUFFIXES)}; at least 2 are needed, "
            "because some files are held out"
        )
    random.Random(0).shuffle(files)  # not by name: neighbours in a folder tell of the same things
    edge = len(files) - max(1, len(files) // _HELD_OUT_ONE_IN)
    sides = [[part for path in side for part in _cut(_read(path))] for side in (files[:edge], files[edge:])]
    return sides[0], sides[1], "Python standard library" if source is None else str(folder)


def _list_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.suffix in TEXT_SUFFIXES and p.is_file() and _belongs(p, folder)]


def _belongs(path: Path, folder: Path) -> bool:
    return not _SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _cut(text: str) -> list[str]:
    parts = [text[i : i + _CHARACTERS_PER_PASSAGE] for i in range(0, len(text), _CHARACTERS_PER_PASSAGE)]
    return [part for part in parts if part.strip()] or [""]
