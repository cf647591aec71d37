"""Run a model over text and say what its routers did and what the text cost: an ``Inspection``, in numbers and as JSON."""

import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.audit.batch import tag_batch
from hf_moe_ext.audit.events import RoutingEvent, watch_routing
from hf_moe_ext.audit.reading import RoutingReading
from hf_moe_ext.audit.recorder import RoutingRecorder
from hf_moe_ext.audit.selectivity import SelectivitySums
from hf_moe_ext.audit.text_batches import InspectedData, make_batches
from hf_moe_ext.audit.thresholds import RoutingWarning

VERSION = 1
FORMAT = "hf_moe_ext inspection"


@dataclass(frozen=True)
class TokenLoss:
    """Mean negative log-likelihood.

    Attributes:
        loss: nats per token.
        tokens: that were scored.
        deviation: standard deviation between tokens, nats.
    """

    loss: float
    tokens: int
    deviation: float = 0.0


@dataclass(frozen=True)
class ModelFacts:
    """What was inspected.

    Attributes:
        name: as the user wrote it.
        model_type: of its configuration.
        config_hash: SHA-256 of its configuration, without names and versions.
        tokenizer_hash: of its vocabulary; losses under two tokenizers cannot be compared.
        adapter: as the user wrote it; None without.
        adapter_hash: of the adapter's configuration; None without.
    """

    name: str
    model_type: str
    config_hash: str
    tokenizer_hash: str
    adapter: str | None = None
    adapter_hash: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """What it was shown: see ``InspectedData``; of the text there is only its hash."""

    name: str
    data_hash: str
    num_rows: int
    num_examples: int
    num_tokens: int
    slice_column: str | None


@dataclass(frozen=True, eq=False)
class Inspection:
    """One model over one text.

    Attributes:
        model: what was inspected.
        data: what it was shown.
        reading: what the routers did.
        selectivity: layer -> router -> share of the choice of experts that the token decides, 0 to 1
            (``selectivity.SelectivitySums``); nothing for routers whose probabilities cannot be had.
        loss: over all scored tokens.
        slice_losses: the same by slice, where the data have slices.
    """

    model: ModelFacts
    data: DataFacts
    reading: RoutingReading
    selectivity: dict[str, dict[str, float]]
    loss: TokenLoss
    slice_losses: dict[str, TokenLoss]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; a loss that is not a number is None."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "data": asdict(self.data),
            "loss": _loss_as_dict(self.loss),
            "slice_losses": {name: _loss_as_dict(each) for name, each in self.slice_losses.items()},
            "selectivity": self.selectivity,
            "reading": self.reading.as_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inspection of ``as_dict``.

        Raises:
            ValueError: it is none, or one of another version.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"an inspection must be an object with format={FORMAT!r}")
        if values.get("version") != VERSION:
            raise ValueError(
                f"an inspection of version {values.get('version')!r} cannot be read, only {VERSION}; write it anew"
            )
        try:
            return cls(
                ModelFacts(**values["model"]),
                DataFacts(**values["data"]),
                RoutingReading.from_dict(values["reading"]),
                {layer: dict(each) for layer, each in values["selectivity"].items()},
                _loss_from_dict(values["loss"]),
                {name: _loss_from_dict(each) for name, each in values["slice_losses"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the inspection lacks something or has too much: {error}; write it anew") from error


def read_inspection(path: str | os.PathLike[str]) -> Inspection:
    """An inspection that ``hf-moe inspect --output`` wrote.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    try:
        return Inspection.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no inspection: {error}. Write one with hf-moe inspect --output") from error


@torch.no_grad()
def inspect_model(
    model: Any,
    data: InspectedData,
    facts: ModelFacts,
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    listener: Callable[[RoutingEvent], None] | None = None,
) -> Inspection:
    """Forward passes over all examples, in evaluation mode; the model's mode is put back.

    Args:
        model: a causal language model with MoE blocks, with an adapter or without.
        data: the text.
        facts: of the model, for the record.
        batch_size: examples at a time.
        pad_id: token to pad with.
        listener: hears every routing event besides; an ``AuditLogWriter``.
    """
    was_training = model.training
    model.eval()
    nats: dict[str, list[Tensor]] = defaultdict(list)
    spread = SelectivitySums()
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore", RoutingWarning)  # what is past a limit is told by `findings`
            recorder = stack.enter_context(RoutingRecorder(model, thresholds=None))
            stack.enter_context(watch_routing(model, spread))
            if listener is not None:
                stack.enter_context(watch_routing(model, listener))
            for examples, batch in make_batches(data.examples, batch_size, pad_id, model.device):
                slices, numbers = [each.slice for each in examples], [each.number for each in examples]
                with tag_batch(slices if data.slice_column else None, numbers):
                    logits = model(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                    ).logits
                for row, each in enumerate(examples):
                    nats[each.slice].append(_token_nats(logits[row], batch["labels"][row]))
            reading = recorder.reading()
    finally:
        model.train(was_training)
    by_slice = {name: _mean(nats[name]) for name in sorted(nats)}
    whole = _mean([each for name in sorted(nats) for each in nats[name]])
    shown = DataFacts(data.name, data.data_hash, data.num_rows, len(data.examples), data.num_tokens, data.slice_column)
    return Inspection(facts, shown, reading, spread.result(), whole, by_slice if data.slice_column else {})


def _token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each scored label of a row [length] under its logits [length, vocabulary], float64."""
    nats = F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="none")
    return nats[labels[1:] != -100].double().cpu()


def _mean(nats: list[Tensor]) -> TokenLoss:
    values = torch.cat(nats)
    if not len(values):
        return TokenLoss(math.nan, 0)
    return TokenLoss(float(values.mean()), len(values), float(values.std(correction=0)))


def _loss_as_dict(loss: TokenLoss) -> dict[str, Any]:
    return {key: value if math.isfinite(value) else None for key, value in asdict(loss).items()}


def _loss_from_dict(values: Mapping[str, Any]) -> TokenLoss:
    loss, deviation = (math.nan if values[key] is None else float(values[key]) for key in ("loss", "deviation"))
    return TokenLoss(loss, int(values["tokens"]), deviation)
