"""Measures on held-out rows: loss per row, text the model writes, the most likely of several answers.

Losses go through `Trainer.predict`, so that sharding, mixed precision and several processes are Trainer's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class RowLosses:
    """Negative log-likelihood of the scored tokens of each row, in nats, and how many they are; both [rows]."""

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Loss per scored token over all rows."""
        return float(self.nats.sum() / self.tokens.sum())


def sum_answer_nats(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """For `Trainer(preprocess_logits_for_metrics=...)`: keep two numbers per row in place of all logits.

    Args:
        logits: [batch, length, vocabulary], or a tuple that holds them.
        labels: [batch, length], -100 where not scored.

    Returns:
        [batch, 2]: summed negative log-likelihood and number of scored tokens.
    """
    if isinstance(logits, tuple):  # a MoE that returns its load-balance loss has that scalar before them
        logits = next(one for one in logits if one.ndim == 3)
    targets = labels[:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    # One tensor of one kind: Trainer gathers and trims it over processes like any other prediction.
    return torch.stack([nats.double().sum(dim=1), (targets != -100).sum(dim=1).double()], dim=1)


def measure_losses(trainer: Trainer, rows: Dataset) -> RowLosses:
    """Loss of every row, in the rows' order; runs on all processes, and all get the result.

    Args:
        trainer: Built with `preprocess_logits_for_metrics=sum_answer_nats`.
        rows: Encoded rows.
    """
    sums = np.asarray(trainer.predict(rows).predictions)
    return RowLosses(nats=sums[:, 0], tokens=sums[:, 1])


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    description: str = "generate",
) -> list[list[int]]:
    """Greedy continuation of each tokenized prompt up to its end of text; in the prompts' order."""
    was_training, generate = model.training, cast(Callable[..., torch.Tensor], model.generate)
    model.eval()
    answers: dict[int, list[int]] = {}
    # Long prompts together: little padding, and a batch that does not fit fails at once rather than at the end.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), desc=description, leave=False):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[i]) for i in chosen]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        for i, tokens in zip(chosen, new_tokens.tolist(), strict=True):
            end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
            answers[i] = tokens[:end]
    model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    description: str = "generate",
) -> list[str]:
    """`generate_tokens` as texts, stripped."""
    answers = generate_tokens(model, tokenizer, prompts, max_new_tokens, batch_size, description)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def choose_answers(losses: RowLosses, question_of_row: Sequence[int]) -> dict[int, int]:
    """The most likely choice of each question: position of its row among the question's rows.

    Choices are compared by the likelihood of the whole answer, not per token: all of one question say the same but for
    the label.
    """
    best: dict[int, tuple[float, int]] = {}
    seen: dict[int, int] = {}
    for row, question in enumerate(question_of_row):
        position = seen.get(question, 0)
        seen[question] = position + 1
        if question not in best or losses.nats[row] < best[question][0]:
            best[question] = (float(losses.nats[row]), position)
    return {question: position for question, (_, position) in best.items()}


def as_plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, through lists and dictionaries; for JSON."""
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value
