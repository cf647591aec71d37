"""Perplexity before and after, slice by slice: where a compressed model lost most, and whether that is too much."""

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_moe_ext.convert.calibration_text import TEXT_SUFFIXES, read_whole
from hf_moe_ext.convert.compress_report import CalibrationReport

# A text without slices of its own is told apart in this many parts, by position.
_NUM_PARTS = 8
_MAX_LENGTH = 512


def check_calibration(source: str | os.PathLike[str] | None, max_loss: float | None) -> None:
    """Refuse a bound without a text, and a text that is not there, before any work is done.

    Raises:
        ValueError: see above.
    """
    if max_loss is not None:
        if isinstance(max_loss, bool) or not isinstance(max_loss, int | float) or not max_loss >= 0:
            raise ValueError(f"max_loss must be a rise of the loss in nats, at least 0; got {max_loss!r}")
        if source is None:
            raise ValueError(f"max_loss={max_loss} needs calibration, the text to measure on (--calibration)")
    if source is not None:
        read_slices(source)


def read_slices(source: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Texts by slice.

    JSONL: each line an object with ``text``, and ``slice`` where it belongs to one (else ``"-"``). A folder: one slice per
    file. A text file: lines in eight parts.

    Raises:
        ValueError: neither, no text in it, or a line that is no such object.
    """
    path = Path(source)
    slices: dict[str, list[str]] = defaultdict(list)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                text, name = _read_line(path, number, line)
                slices[name].append(text)
    elif path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        size = max(1, math.ceil(len(lines) / _NUM_PARTS))
        for start in range(0, len(lines), size):
            slices[f"lines {start + 1}-{min(start + size, len(lines))}"].append("\n".join(lines[start : start + size]))
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()):
            slices[str(file.relative_to(path))] += read_whole(file)[0]
    found = {name: [text for text in texts if text.strip()] for name, texts in slices.items()}
    found = {name: texts for name, texts in found.items() if texts}
    if not found:
        raise ValueError(f"calibration: {source} is no JSONL, text file or folder of texts with any text in it")
    return found


def tokenize_slices(folder: Path, slices: dict[str, list[str]]) -> dict[str, list[Tensor]]:
    """Token ids of each slice in rows of at most 512, by the tokenizer and configuration of a checkpoint.

    Raises:
        ValueError: no tokenizer, one of a larger vocabulary than the model's, or too little text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration: {folder} has no tokenizer that can be read; save the model's own there, or leave calibration out"
        ) from error
    config = AutoConfig.from_pretrained(folder)
    length = min(_MAX_LENGTH, config.max_position_embeddings)
    rows: dict[str, list[Tensor]] = {}
    for name, texts in slices.items():
        each = []
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            each += [torch.tensor(ids[i : i + length]) for i in range(0, len(ids), length)]
        each = [row for row in each if len(row) > 1]
        if each:
            rows[name] = each
    if not rows:
        raise ValueError("calibration: the tokenizer makes no two tokens of any text; give more text")
    largest = max(int(row.max()) for each in rows.values() for row in each)
    if largest >= config.vocab_size:
        raise ValueError(
            f"calibration: the tokenizer in {folder} gives token {largest}, the model has vocab_size={config.vocab_size}; it "
            "is not this model's, put its own there"
        )
    return rows


def measure_calibration(
    before: Path, after: Path, source: str, rows: dict[str, list[Tensor]], max_loss: float | None
) -> CalibrationReport:
    """Perplexities of two checkpoints of one model, one after the other in memory.

    Args:
        before: the source.
        after: the result.
        source: name of the text.
        rows: its token ids by slice, of ``tokenize_slices``.
        max_loss: largest rise of the loss that is allowed, nats per token.

    Raises:
        ValueError: a rise of the loss above ``max_loss``.
    """
    nats = [_losses(folder, rows) for folder in (before, after)]
    tokens = {name: sum(len(row) - 1 for row in each) for name, each in rows.items()}
    slices = {
        name: {
            "num_tokens": float(count),
            "loss_before": nats[0][name] / count,
            "loss_after": nats[1][name] / count,
            "rise": (nats[1][name] - nats[0][name]) / count,
        }
        for name, count in tokens.items()
    }
    total = sum(tokens.values())
    losses = [sum(each.values()) / total for each in nats]
    worst = max(slices, key=lambda name: slices[name]["rise"])
    rise = losses[1] - losses[0]
    # Not a number is no rise that anybody allowed.
    if max_loss is not None and not rise <= max_loss:
        raise ValueError(
            f"the loss on {source} rises by {rise:.4f} nats a token ({losses[0]:.4f} to {losses[1]:.4f}), above "
            f"max_loss={max_loss}; the worst slice is {worst!r} with {slices[worst]['rise']:+.4f} nats. Nothing was written: choose "
            "a milder rate, or a larger max_loss"
        )
    return CalibrationReport(
        source, total, math.exp(losses[0]), math.exp(losses[1]), rise, worst, slices[worst]["rise"], slices
    )


def _read_line(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"calibration: line {number} of {path} is no JSON ({error}); write one object per line"
        ) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(
            f'calibration: line {number} of {path} must be an object with a string "text"; got {line[:60]!r}'
        )
    return entry["text"], str(entry.get("slice", "-"))


@torch.no_grad()
def _losses(folder: Path, rows: dict[str, list[Tensor]]) -> dict[str, float]:
    """Sum of each slice's negative log-likelihoods, in nats, of every token but a row's first."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    return {name: sum(_loss(model, row) for row in each) for name, each in rows.items()}


def _loss(model: Any, row: Tensor) -> float:
    logits = model(input_ids=row[None]).logits[0, :-1].float()
    return float(F.cross_entropy(logits, row[1:], reduction="sum"))
