"""A tiny OLMoE, really trained for a few seconds: random weights have no low-rank structure to find."""

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from support import zoo
from support.words import build_tokenizer

LENGTH = 64


def characters(names: list[str], rows: int) -> Tensor:
    """Source text of standard-library modules, one id per character [rows, 64]."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text(encoding="utf-8") for name in names)
    ids = [3 + ord(character) % (zoo.VOCAB_SIZE - 3) for character in text[: rows * LENGTH]]
    return torch.tensor(ids).view(rows, LENGTH)


@pytest.fixture(scope="session")
def train_rows() -> Tensor:
    return characters(["argparse.py", "ast.py", "difflib.py"], 1600)


@pytest.fixture(scope="session")
def held_out_rows() -> Tensor:
    return characters(["tarfile.py"], 96)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, worker_id: str, train_rows: Tensor) -> Path:
    """Folder of the trained model with a tokenizer, as the stock class saves it; trained once for all workers."""
    if worker_id == "master":
        return train_source(tmp_path_factory.mktemp("source"), train_rows)
    shared = tmp_path_factory.getbasetemp().parent / "convert_source"
    with FileLock(f"{shared}.lock"):
        return shared / "model" if (shared / "model").is_dir() else train_source(shared, train_rows)


def train_source(folder: Path, train_rows: Tensor) -> Path:
    """Train with the plain Trainer and save in one move."""
    model = zoo.build("olmoe", num_hidden_layers=3)
    rows: Any = [{"input_ids": row, "labels": row} for row in train_rows]
    arguments = TrainingArguments(
        **{"output_dir": str(folder / "run"), "max_steps": 100, "per_device_train_batch_size": 8},
        **{"learning_rate": 4e-3, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        **{"dataloader_pin_memory": False, "seed": 0},
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
    model.save_pretrained(folder / "staging")
    build_tokenizer().save_pretrained(folder / "staging")
    return (folder / "staging").rename(folder / "model")
