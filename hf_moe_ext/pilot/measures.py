"""What an arm measures beside its losses: memory, the time of an answer, the user's metric, the routers' health."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from hf_moe_ext.audit.recorder import RoutingRecorder
from hf_moe_ext.host.blocks import iterate_experts
from hf_moe_ext.pilot import rows as pilot_rows
from hf_moe_ext.row_losses import choose_answers, generate_answers, measure_losses
from hf_moe_ext.text_rows import encode_prompt

LATENCY_TOKENS, LATENCY_PROMPT, LATENCY_REPEATS = 16, 128, 5


def load_metric(name: str) -> Any:
    """An `evaluate` metric.

    Raises:
        ValueError: It is neither a local module nor one that can be had from the Hub.
    """
    import evaluate

    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # the loader, the network client and the module itself raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--metric {name} cannot be loaded: {type(error).__name__}: {reason}. Give the folder of a metric module, an id "
            "of `evaluate` (and be online), or 'choices' for the accuracy among answer choices."
        ) from error


def peak_bytes() -> int:
    """Largest memory of this process so far: of the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def measure_latency(model: Any, ids: list[int]) -> dict[str, float]:
    """Seconds to read a prompt, and per token written after it; one sequence.

    Args:
        model: With its adapter.
        ids: Tokens of a prompt; its last `LATENCY_PROMPT` are used.

    Returns:
        `prefill_s` (median) and `decode_s` per token, and `prompt_tokens`.
    """
    model.eval()
    prompt = torch.tensor([ids[-LATENCY_PROMPT:]], device=model.device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    prefill = _time(lambda: model(**inputs))
    settings = {
        "max_new_tokens": LATENCY_TOKENS,
        "min_new_tokens": LATENCY_TOKENS,
        "do_sample": False,
        "use_cache": True,
    }
    whole = _time(lambda: model.generate(**inputs, **settings, pad_token_id=0))
    return {
        "prefill_s": prefill,
        "decode_s": max(0.0, whole - prefill) / (LATENCY_TOKENS - 1),
        "prompt_tokens": prompt.shape[1],
    }


def _time(call: Any) -> float:
    times = []
    for _ in range(LATENCY_REPEATS + 1):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first one warms up


def measure_metric(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, spec: dict[str, Any]
) -> dict[str, Any]:
    """The user's metric on held-out rows; empty where none was asked for.

    Args:
        trainer: With the trained model.
        tokenizer: Of the model.
        folder: Of the pilot.
        spec: Of the arm: `metric`, `metric_rows`, `max_new_tokens`, `max_length`.

    Raises:
        ValueError: The metric returns no number.
    """
    if spec["metric"] is None:
        return {}
    if spec["metric"] == pilot_rows.CHOICES_METRIC:
        return {"accuracy": measure_accuracy(trainer, folder)}
    texts = pilot_rows.load_texts(folder)
    asked = [i for i, prompt in enumerate(texts["prompt"]) if prompt]
    step = max(1, len(asked) // spec["metric_rows"])
    asked = asked[::step][: spec["metric_rows"]]  # rows are sorted by length: some of every length
    chosen = texts.select(asked)
    limit = max(1, spec["max_length"] - spec["max_new_tokens"])
    prompts = [encode_prompt(prompt, tokenizer, limit) for prompt in chosen["prompt"]]
    answers = generate_answers(trainer.model, tokenizer, prompts, spec["max_new_tokens"], spec["batch_size"] * 2)  # type: ignore[arg-type]
    scores = load_metric(spec["metric"]).compute(predictions=answers, references=chosen["completion"][:])
    numbers = {key: float(value) for key, value in (scores or {}).items() if isinstance(value, int | float)}
    if not numbers:
        raise ValueError(f"--metric {spec['metric']} returned no number, but {scores!r}.")
    return numbers


def measure_accuracy(trainer: Trainer, folder: Path) -> float:
    """Share of the held-out questions whose most likely answer choice is the right one."""
    choices = pilot_rows.load_side(folder, pilot_rows.CHOICES)
    right = pilot_rows.load_facts(folder)["right_choices"]
    chosen = choose_answers(measure_losses(trainer, _tokens_only(choices)), choices["question"])
    return sum(chosen[question] == answer for question, answer in enumerate(right)) / len(right)


def _tokens_only(rows: Dataset) -> Dataset:
    return rows.select_columns(["input_ids", "labels"])


@contextmanager
def watch_routers(model: nn.Module) -> Iterator[dict[str, float]]:
    """Health of base and adapter routers over the forward passes inside the block, in the words of `RoutingReading.summary`.

    Filled in when the block ends; stays empty for a model without experts.
    """
    health: dict[str, float] = {}
    if not list(iterate_experts(model)):
        yield health
        return
    with RoutingRecorder(model, thresholds=None) as recorder:
        yield health
    health |= recorder.reading().summary()
