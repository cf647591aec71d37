"""The README's code blocks, by section, and what a reader would have at hand to run them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Section:
    """One heading of the README.

    Attributes:
        title: of the heading.
        python: its Python blocks, in order.
        commands: the lines of its shell blocks, in order; a line that ends in a backslash goes on.
    """

    title: str
    python: tuple[str, ...]
    commands: tuple[str, ...]


def read_sections(text: str = README) -> dict[str, Section]:
    """Sections with code, by title."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        python = tuple(read_blocks("python", body))
        shell = "".join(read_blocks("bash", body)).replace("\\\n", " ")
        commands = tuple(line for line in shell.splitlines() if line.strip())
        if python or commands:
            found[title] = Section(title, python, commands)
    return found


def read_blocks(language: str, text: str = README) -> list[str]:
    """All code blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def copy_recipes(folder: Path) -> None:
    """The recipes as in a clone, without what runs have left there."""
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))


# What the text calls "your" data and arguments.
PRELUDE = """
import warnings
import torch
import hf_moe_ext
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
tokens = [[1 + (7 * row + place) % 90 for place in range(16)] for row in range(16)]
rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
batches = [{"input_ids": torch.tensor(tokens)}]
args = TrainingArguments(
    "my-run", max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True,
    dataloader_pin_memory=False, save_strategy="no",
)
"""
