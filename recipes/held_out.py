"""Everything measured on the held-out rows, once before and once after training."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from finetune_arguments import DataArguments, UserError
from finetune_data import encode_rows, expand_choices
from hf_moe_ext import record_router_load
from hf_moe_ext.row_losses import RowLosses, choose_answers, generate_tokens, measure_losses
from hf_moe_ext.text_rows import encode_prompt
from quickstart.docstrings import name_words

METRIC = Path(__file__).resolve().parent / "metrics" / "docstring_overlap"
METRIC_SCORE = "word_f1"
SHOWN_ROWS = 8
NUM_SHUFFLES = 20


@dataclass(frozen=True)
class Measurement:
    """One measurement; every process has all of it but the texts, which the first one writes."""

    losses: RowLosses
    router_load: dict[str, list[float]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "nats": self.losses.nats.tolist(),
            "tokens": self.losses.tokens.tolist(),
            "router_load": self.router_load,
            "texts": self.texts,
            "accuracy": self.accuracy,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Measurement":
        """The opposite of `as_dict`."""
        losses = RowLosses(np.asarray(saved["nats"]), np.asarray(saved["tokens"]))
        return cls(losses, saved["router_load"], saved["texts"], saved["accuracy"])


def read_measurement(checkpoint: str, name: str) -> Measurement:
    """What the run of a checkpoint measured before its first step.

    Args:
        checkpoint: The `checkpoint-N` folder; the measurement lies beside it.
        name: Of the file.

    Raises:
        UserError: There is none.
    """
    path = Path(checkpoint).parent / name
    try:
        return Measurement.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {path} of that run cannot be read ({error}), so there is nothing to compare "
            "with. Start again in a new --output_dir."
        ) from error


class MeasureFirst(TrainerCallback):
    """Measures the model before its first step, in the Trainer that trains it, and keeps that for a resumed run.

    Not with a Trainer of its own: sharding wants model and optimizer together, and a model that evaluation has prepared
    is not wrapped again for training (accelerate marks it), so that processes would not exchange gradients. An adapter
    that was just attached changes nothing yet.

    Args:
        trainer: That trains.
        held_out: Rows to measure on.
        path: Where the measurement is kept.
        known: The measurement of the run that is resumed, whose model will hold a checkpoint when training begins.
    """

    measurement: Measurement

    def __init__(self, trainer: Trainer, held_out: "HeldOut", path: Path, known: Measurement | None) -> None:
        self.trainer, self.held_out, self.path, self.known = trainer, held_out, path, known
        self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Measure; the random state stays as it was."""
        began, first = time.monotonic(), self.trainer.is_world_process_zero()
        if self.known is not None:
            # As in the run that wrote it, only the first process has texts.
            self.measurement = self.known if first else replace(self.known, texts=[])
        else:
            with torch.random.fork_rng():
                self.measurement = self.held_out.measure(self.trainer, "before")
        if first:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.measurement.as_dict()), encoding="utf-8")
            partial.replace(self.path)
        self.seconds = round(time.monotonic() - began, 2)


@contextmanager
def root_weights(model: torch.nn.Module) -> Iterator[None]:
    """Under FSDP2 gather what belongs to no layer (embeddings, head): `generate` calls the model inside the sharded one."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()


def write_tokens(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    description: str,
) -> list[list[int]]:
    """Greedy continuations of tokenized prompts, on the first process; the others wait and have none.

    Where one model is spread over the processes, all of them write, since each step needs all; the first one's count.
    """
    assert trainer.model is not None
    first, written = trainer.is_world_process_zero(), []
    spread = trainer.is_distributed_loading_by_transformers or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if prompts and (first or spread):
        with root_weights(trainer.model):
            model = trainer.accelerator.unwrap_model(trainer.model)
            written = generate_tokens(model, tokenizer, prompts, max_new_tokens, description=description)
    trainer.accelerator.wait_for_everyone()
    return written if first else []


class HeldOut:
    """The held-out rows, ready to be measured.

    Args:
        rows: Rows of `prompt` and `completion`, and `name`, `answer`, `choices`, `group` where the data set has them.
        train: The train rows, for the majority class.
        tokenizer: The model's tokenizer.
        arguments: The data arguments.
    """

    def __init__(
        self, rows: Dataset, train: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
    ) -> None:
        encoded = encode_rows(rows, tokenizer, arguments.max_length, "tokenize held-out rows")
        # Rows of one length together: batches with little padding.
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
        self.rows, self.encoded = rows.select(order), encoded.select(order)
        self.tokenizer, self.arguments = tokenizer, arguments
        self.written_rows = self._choose_written_rows()
        self.groups = self.rows["group"] if "group" in rows.column_names else ["all"] * len(rows)
        self.choices: Dataset | None = None
        if arguments.answer_choices_metric:
            choices, self.question_of_row, self.right = expand_choices(self.rows)
            self.choices = encode_rows(choices, tokenizer, arguments.max_length, "tokenize answer choices")
            self.majority = self._find_majority(train)

    def _choose_written_rows(self) -> list[int]:
        """Rows to write an answer for: spread over all lengths, and only rows that ask something."""
        asked = [i for i, prompt in enumerate(self.rows["prompt"]) if prompt]
        count = self.arguments.num_generations
        if count is None:
            count = len(asked) if "name" in self.rows.column_names else SHOWN_ROWS
        return [asked[i] for i in np.linspace(0, len(asked) - 1, min(count, len(asked))).astype(int)] if asked else []

    def _find_majority(self, train: Dataset) -> dict[str, str]:
        groups = train["group"] if "group" in train.column_names else ["all"] * len(train)
        counted: dict[str, Counter[str]] = {}
        for group, answer in zip(groups, train["answer"], strict=True):
            counted.setdefault(group, Counter())[answer] += 1
        return {group: counts.most_common(1)[0][0] for group, counts in counted.items()}

    def measure(self, trainer: Trainer, description: str) -> Measurement:
        """Losses and accuracy through `Trainer.predict`; texts written by the first process while the others wait."""
        assert trainer.model is not None
        with record_router_load(trainer.model) as load:
            losses = measure_losses(trainer, self.encoded)
        shares = load.fractions()  # summed over processes, so every one of them asks
        accuracy = self._measure_accuracy(trainer) if self.choices is not None else {}
        limit = self.arguments.max_length - self.arguments.max_new_tokens
        prompts = [encode_prompt(self.rows[i]["prompt"], self.tokenizer, max(limit, 1)) for i in self.written_rows]
        written = write_tokens(
            trainer, self.tokenizer, prompts, self.arguments.max_new_tokens, f"write answers {description}"
        )
        texts = (
            [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)] if written else []
        )
        return Measurement(losses, shares, texts, accuracy)

    def _measure_accuracy(self, trainer: Trainer) -> dict[str, float]:
        assert self.choices is not None
        chosen = choose_answers(measure_losses(trainer, self.choices), self.question_of_row)
        hits: dict[str, list[bool]] = {}
        for question, group in enumerate(self.groups):
            hits.setdefault(group, []).append(chosen[question] == self.right[question])
        return {group: float(np.mean(values)) for group, values in hits.items()}

    def report_accuracy(self, before: Measurement, after: Measurement | None) -> dict[str, dict[str, Any]]:
        """Accuracy per group, beside always giving the train side's most frequent answer."""
        report = {}
        for group in before.accuracy:
            answers = [answer for answer, g in zip(self.rows["answer"], self.groups, strict=True) if g == group]
            report[group] = {
                "before": before.accuracy[group],
                "after": None if after is None else after.accuracy[group],
                "majority_class": answers.count(self.majority.get(group, "")) / len(answers),
                "rows": len(answers),
            }
        return report

    def report_text(self, before: Measurement, after: Measurement | None, seed: int) -> dict[str, Any] | None:
        """The text metric with its two baselines; None when rows have no function name to compare with."""
        if "name" not in self.rows.column_names or not before.texts:
            return None
        metric = evaluate.load(str(METRIC), keep_in_memory=True)
        rows = self.rows.select(self.written_rows)
        references = rows["completion"][:]

        def score(predictions: list[str]) -> dict[str, float]:
            return metric.compute(predictions=predictions, references=references)

        report: dict[str, Any] = {"name": METRIC_SCORE, "rows": len(references), "all_scores": {}}
        candidates = {"before": before.texts, "name_words": [name_words(name) for name in rows["name"]]}
        if after is not None:
            candidates["after"] = after.texts
        for what, predictions in candidates.items():
            report["all_scores"][what] = score(predictions)
        if after is not None:
            generator = np.random.default_rng(seed)
            shuffled = [
                score([after.texts[i] for i in generator.permutation(len(references))]) for _ in range(NUM_SHUFFLES)
            ]
            report["all_scores"]["shuffled"] = {k: float(np.mean([s[k] for s in shuffled])) for k in shuffled[0]}
        return report | {what: scores[METRIC_SCORE] for what, scores in report["all_scores"].items()}

    def tabulate(self, before: Measurement, after: Measurement | None) -> dict[str, list[Any]]:
        """Losses per row, for comparing runs row by row; what names a row stands first."""
        named = {name: self.rows[name][:] for name in ("module", "name", "group") if name in self.rows.column_names}
        table = {
            **named,
            "tokens": before.losses.tokens.astype(int).tolist(),
            "nats_before": before.losses.nats.tolist(),
        }
        return table if after is None else {**table, "nats_after": after.losses.nats.tolist()}

    def sample_texts(self, before: Measurement, after: Measurement | None) -> list[dict[str, str | None]]:
        """Some rows with their reference and what was written."""
        if not before.texts:
            return []
        places = np.unique(np.linspace(0, len(self.written_rows) - 1, SHOWN_ROWS).astype(int))
        return [
            {
                "prompt": self.rows[self.written_rows[i]]["prompt"],
                "reference": self.rows[self.written_rows[i]]["completion"],
                "before": before.texts[i],
                "after": None if after is None else after.texts[i],
            }
            for i in places
        ]
