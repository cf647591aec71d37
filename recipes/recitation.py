"""For the card: whether held-out rows were trained on, and whether the model recites what it was trained on."""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from finetune_arguments import DataArguments
from held_out import write_tokens
from hf_moe_ext.cards.measures import duplicate_rate, verbatim_rate

NUM_PROMPTS = 32
RUN_TOKENS = 16


def measure_data(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, Dataset],
    encoded: dict[str, Dataset],
    arguments: DataArguments,
) -> dict[str, Any]:
    """Duplicates between the sides, and the share of some prompts of each that the model continues with training text.

    Args:
        trainer: Its model has been trained; every process calls this.
        tokenizer: The model's.
        rows: `{"train": rows, "test": rows}` with `prompt` and `completion`.
        encoded: The same as tokens and labels; any order.
        arguments: Lengths of rows and of answers.

    Returns:
        What `metrics.json` holds under `data`; on the first process only.
    """
    length = min(RUN_TOKENS, arguments.max_new_tokens)
    written = {
        side: write_tokens(
            trainer, tokenizer, choose_prompts(part, arguments), arguments.max_new_tokens, f"continue {side} prompts"
        )
        for side, part in encoded.items()
    }
    if not trainer.is_world_process_zero():
        return {}
    texts = {side: [f"{row['prompt']}\n{row['completion']}" for row in part] for side, part in rows.items()}
    report: dict[str, Any] = {
        "duplicate_rate": duplicate_rate(texts["train"], texts["test"]),
        "verbatim_tokens": length,
        "verbatim_prompts": {side: len(part) for side, part in written.items()},
    }
    for side, name in (("train", "train"), ("test", "held_out")):
        training = (row["input_ids"] for row in encoded["train"])
        if written[side]:
            report[f"verbatim_rate_{name}"] = verbatim_rate(written[side], training, length)
    return report


def choose_prompts(rows: Dataset, arguments: DataArguments) -> list[list[int]]:
    """Prompts of some rows, spread over all: what carries no loss, and of plain text the first half."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(NUM_PROMPTS, len(rows))).astype(int))
    limit, prompts = max(arguments.max_length - arguments.max_new_tokens, 1), []
    for i in chosen:
        ids, labels = rows[int(i)]["input_ids"], rows[int(i)]["labels"]
        asked = next((place for place, label in enumerate(labels) if label != -100), 0)
        prompts.append(ids[: asked or max(1, len(ids) // 2)][-limit:])
    return prompts
