"""One cell of `sparsity_grid.py`: a small model trained for a budget, and what is recorded of it."""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch

from finetune_arguments import UserError
from hf_moe_ext.row_losses import measure_losses
from hf_moe_ext.scaling.exchange import Exchange, expect_sent, layer_bytes
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep, training_memory
from hf_moe_ext.scaling.operations import Tokens
from hf_moe_ext.scaling.shape import MoeShape
from hf_moe_ext.text_rows import RowSource, read_rows
from mup_transfer_arguments import VOCAB_SIZE
from mup_transfer_training import TransferTraining
from sparsity_grid_arguments import GridCell, build_config, describe_cell

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
from step_cost import count_bytes, measure_transient_bytes, state_tensors

IGNORED = -100
ELEMENT_BYTES = 2  # of a hidden state on the wire, in bfloat16


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What `TransferTraining` asks of a cell."""

    learning_rate: float
    seed: int
    max_steps: int


def find_cell(
    cell: GridCell, arguments: argparse.Namespace, settings: dict[str, Any], folder: Path
) -> dict[str, Any] | None:
    """The record of a finished cell, or None.

    Raises:
        UserError: its file is of other settings, or no record.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, wanted = record["settings"], describe_cell(cell, arguments, settings)["settings"]
        record["run"]["loss"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output_dir: {path} is no record of a cell ({error}). Remove it.") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"--output_dir: {path} was made with {name} {found.get(name)!r}, not {value!r}; cells of different settings "
                "are not mixed. Give the earlier setting, or another folder."
            )
    return dict(record)


def run_cell(arguments: argparse.Namespace, settings: dict[str, Any], folder: Path, cell: GridCell) -> dict[str, Any]:
    """Train one cell and write its record, or read the one it left; in a process of a pool."""
    known = find_cell(cell, arguments, settings, folder)
    if known is not None:
        return known
    torch.set_num_threads(arguments.num_threads)
    began = time.monotonic()
    run = train_cell(cell, arguments)
    record = {**describe_cell(cell, arguments, settings), "run": run, "seconds": round(time.monotonic() - began, 2)}
    return write_record(record, folder / f"{cell.name}.json")


def write_record(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Moved into place whole: a cell's file is a finished cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    os.chmod(partial, 0o644)  # mkstemp's own is for its owner alone
    os.replace(partial, path)
    return record


def train_cell(cell: GridCell, arguments: argparse.Namespace) -> dict[str, Any]:
    """The columns of a cell's row in the table of runs."""
    config = build_config(cell, arguments)
    shape = MoeShape.from_hf(config)
    flops_per_token = shape.training_flops(arguments.length).total
    tokens_per_step = arguments.batch_size * arguments.length
    steps = max(1, round(cell.budget_flops / flops_per_token / tokens_per_step))
    trained = copy.copy(arguments)
    trained.warmup_steps = round(arguments.warmup_fraction * steps)
    trainer = TransferTraining(trained)(config, _Schedule(cell.learning_rate, cell.seed, steps))
    trainer.train()
    loss = float(trainer.evaluate()["eval_nats_per_token"])
    answers = {
        f"answer_loss_{answer_name(path)}": measure_losses(
            trainer, read_answers(path, arguments.num_answer_rows, arguments.length)
        ).mean
        for path in arguments.reasoning_file
    }
    return {
        "total_parameters": shape.total_parameters,
        "active_parameters": shape.active_parameters,
        "dense_parameters": shape.parameters.active(input_embedding=False) - shape.parameters.output_embedding,
        "num_tokens": steps * tokens_per_step,
        "sparsity": shape.sparsity,
        "num_experts": cell.num_experts,
        "top_k": arguments.top_k,
        "expert_ratio": cell.num_experts / arguments.top_k,
        "budget_flops": cell.budget_flops,
        "training_flops": flops_per_token * steps * tokens_per_step,
        "loss": loss if math.isfinite(loss) else None,
        "bits_per_byte": loss / math.log(2) if math.isfinite(loss) else None,
        **answers,
        "all_to_all_bytes_per_token": count_exchange_bytes(shape, arguments.expert_parallel),
        "memory_measured_bytes": measure_memory(trainer, arguments),
        "memory_formula_bytes": predict_memory(shape, arguments),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "num_steps": steps,
        "tokenizer": "bytes",
    }


def count_exchange_bytes(shape: MoeShape, num_ranks: int) -> float:
    """Bytes that one trained token sends to other ranks in all layers, by the package's formula, for uniform routing."""
    total = 0.0
    for layer in shape.moe_layers:
        ranks = math.gcd(num_ranks, layer.num_experts)
        exchange = Exchange(shape.hidden_size, layer.num_experts, layer.top_k, ranks, ELEMENT_BYTES)
        total += layer_bytes(exchange, "all_to_all", expect_sent(exchange, "all_to_all", 1)).payload
    return total


def predict_memory(shape: MoeShape, arguments: argparse.Namespace) -> float:
    """Bytes at the peak of a float32 training step on one rank, by the package's formula."""
    tokens = Tokens(arguments.batch_size, arguments.length)
    return training_memory(shape, Layout(), TrainingStep(tokens, precision="float32")).total


def measure_memory(trainer: Any, arguments: argparse.Namespace) -> int:
    """Bytes allocated at the peak of one more training step, with the run's own optimizer and its states."""
    model, optimizer = trainer.model, trainer.optimizer
    device = next(model.parameters()).device
    ids = torch.arange(arguments.length, device=device).repeat(arguments.batch_size, 1) % VOCAB_SIZE

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    model.zero_grad(set_to_none=True)
    step()
    resident = count_bytes([*model.parameters(), *model.buffers(), *state_tensors(optimizer)])
    return resident + measure_transient_bytes(step, device.type)


def answer_name(path: Path) -> str:
    """`boolq_test` of `boolq_test.jsonl.gz`."""
    return path.name.split(".")[0]


@functools.cache
def read_answers(path: Path, num_rows: int, length: int) -> datasets.Dataset:
    """The first rows of a file as bytes, with labels on the answer alone; of a long prompt the end is kept.

    Raises:
        UserError: it cannot be read, has no row with an answer, or an answer does not fit into a row.
    """
    datasets.disable_progress_bars()
    try:
        read = read_rows(RowSource(str(path), option="--reasoning_file"))
    except ValueError as error:
        raise UserError(str(error)) from error
    rows = read.select(range(min(num_rows, len(read)))).to_list()
    if not rows or not rows[0].get("prompt"):
        raise UserError(
            f"--reasoning_file {path} has no row with a question and an answer. Give instruction and output."
        )
    return datasets.Dataset.from_list([encode_answer(row["prompt"], row["completion"], length) for row in rows])


def encode_answer(prompt: str, answer: str, length: int) -> dict[str, list[int]]:
    """One row of exactly `length` bytes: the prompt's end and the answer, labelled; what is missing stands behind it.

    Raises:
        UserError: the answer leaves no byte for a prompt.
    """
    end = list(answer.encode())
    if len(end) >= length:
        raise UserError(
            f"--length {length} must be above the {len(end)} bytes of the answer {answer[:40]!r}. Raise it."
        )
    start = list(prompt.encode())[-(length - len(end)) :]
    filling = length - len(start) - len(end)
    # Behind the answer nothing is seen by it, so what stands there is no matter.
    return {
        "input_ids": start + end + [0] * filling,
        "labels": [IGNORED] * len(start) + end + [IGNORED] * filling,
    }
