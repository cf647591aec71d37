"""Inspections made by hand, and tiny models on disk to inspect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_moe_ext.audit.inspection import DataFacts, Inspection, ModelFacts, TokenLoss
from hf_moe_ext.audit.reading import RouterReading, RoutingReading
from support import zoo
from support.words import build_tokenizer

MODEL = ModelFacts("model", "olmoe", "c0", "t0")
DATA = DataFacts("old.jsonl", "d0", 100, 100, 4000, None)
# Words that the tokenizer of the tests does not split: their number begins with none of a special word's.
FIRST_WORD = 30


def router(counts: list[int], layer: int = 0, kind: str = "base", top_k: int = 1, **more: Any) -> RouterReading:
    """A reading with these counts and unremarkable probabilities."""
    values = {"entropy": 0.5, "max_probability": 0.6, "margin": 0.3} | more
    name = f"model.layers.{layer}.mlp.experts"
    return RouterReading(name, kind, len(counts), top_k, sum(counts) // top_k, np.array(counts), **values)


def inspection(
    *routers: RouterReading,
    selectivity: float = 0.3,
    loss: float = 2.0,
    slice_losses: dict[str, TokenLoss] | None = None,
    model: ModelFacts = MODEL,
    data: DataFacts = DATA,
) -> Inspection:
    """An inspection of these routers."""
    told: dict[str, dict[str, float]] = {}
    for one in routers:
        told.setdefault(one.layer, {})[one.router] = selectivity
    return Inspection(model, data, RoutingReading(routers), told, TokenLoss(loss, 4000), slice_losses or {})


def save(model: Any, folder: Path) -> Path:
    """A model with the tokenizer of words, saved."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_text(length: int, generator: torch.Generator, low: int = FIRST_WORD, high: int = zoo.VOCAB_SIZE) -> str:
    """Words ``w{low}`` to ``w{high - 1}`` at random."""
    return " ".join(f"w{i}" for i in torch.randint(low, high, (length,), generator=generator).tolist())


def random_rows(count: int = 40, length: int = 24, seed: int = 0, low: int = FIRST_WORD) -> list[dict[str, Any]]:
    """Rows of ``text``, in turn of the slices "odd" and "even"."""
    generator = torch.Generator().manual_seed(seed)
    names = ("even", "odd")
    return [{"text": random_text(length, generator, low), "slice": names[i % 2]} for i in range(count)]
