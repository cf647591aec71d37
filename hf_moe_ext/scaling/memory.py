"""Memory of one rank, in buckets, at the worst moment of a training step.

A training step is walked backward operation by operation (`activations.py`): saved tensors go, gradients come, and what the
operation works in stands on top; the peak is the largest sum. Allocated bytes: what an allocator rounds up, caches or
fragments, a library's own workspace and a CUDA context come on top (5 to 10 % is often said).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from hf_moe_ext.scaling.activations import BlockBytes
from hf_moe_ext.scaling.layout import (
    Layout,
    LocalParameters,
    embedding_parameters_on_rank,
    layer_parameters_on_rank,
    stage_layers,
    stage_parameters,
)
from hf_moe_ext.scaling.operations import Operation, Tokens
from hf_moe_ext.scaling.precision import Precision, choose_precision
from hf_moe_ext.scaling.shape import MoeShape
from hf_moe_ext.scaling.size_checks import check_at_least

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
LOGITS = ("cross-entropy", "un-embedding")


@dataclass(frozen=True)
class Buckets:
    """Bytes on one rank.

    Attributes:
        weights: parameters.
        gradients: of them.
        optimizer: its states, a float32 copy of the weights included.
        activations: saved for backward.
        working: gradients of activations and temporaries.
        logits: log-probabilities and gradients of the loss.
        exchange: all-to-all rows, gathered weights (ZeRO-3), buckets of gradients.
        kv_cache: keys and values, in serving.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    working: float = 0
    logits: float = 0
    exchange: float = 0
    kv_cache: float = 0

    @property
    def total(self) -> float:
        """All of them."""
        # Written out: it is asked for at every operation of every layer.
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.working + self.logits
            + self.exchange + self.kv_cache
        )  # fmt: skip

    def as_dict(self) -> dict[str, float]:
        """With the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Memory:
    """The worst moment on the worst rank.

    Attributes:
        peak: what is held then.
        moment: the operation whose backward runs, or "optimizer step", "prefill".
        stage: pipeline stage of that rank.
    """

    peak: Buckets
    moment: str
    stage: int = 0

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.peak.total


@dataclass(frozen=True)
class TrainingStep:
    """How one optimizer step is run.

    Attributes:
        tokens: of a micro-batch on one rank.
        precision: a name of `precision.PRECISIONS`.
        optimizer: a name of `precision.STATES_PER_PARAMETER`.
        recompute: what backward runs again: nothing, the experts' and FFNs' inner rows and eager attention weights, or
            whole layers (gradient checkpointing).
        num_micro_batches: m, per rank and step.
        gradient_bucket_views: DDP's ``gradient_as_bucket_view``; without it DDP holds every gradient a second time.
    """

    tokens: Tokens
    precision: str = "autocast"
    optimizer: str = "adamw"
    recompute: Recompute = "none"
    num_micro_batches: int = 1
    gradient_bucket_views: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_micro_batches")
        choose_precision(self.precision, self.optimizer)
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")


def training_memory(shape: MoeShape, layout: Layout, step: TrainingStep) -> Memory:
    """Peak of a training step that is not the first: optimizer states are there.

    Raises:
        ValueError: the layout does not fit the shape.
    """
    layout.check(shape)
    if step.tokens.sequence_length % layout.context:
        raise ValueError(
            f"Layout: context must divide sequence_length={step.tokens.sequence_length}, got {layout.context}"
        )
    # The first stage holds most micro-batches, the last the logits; those between are no worse than the first.
    stages = {0, layout.pipeline - 1} if layout.pipeline < 3 else {0, 1, layout.pipeline - 1}
    return max((_Stage(shape, layout, step, stage).peak() for stage in sorted(stages)), key=lambda memory: memory.total)


def bytes_per_parameter(precision: Precision, zero: int, num_ranks: int) -> float:
    """Weights, gradients and optimizer states, with what ZeRO shares over this many ranks: w/z3 + g/z2 + o/z1."""
    weights, gradients, states = _shares(zero, num_ranks)
    return precision.weight / weights + precision.gradient / gradients + precision.optimizer / states


def _shares(zero: int, num_ranks: int) -> tuple[int, int, int]:
    return num_ranks if zero > 2 else 1, num_ranks if zero > 1 else 1, num_ranks if zero > 0 else 1


class _Stage:
    """One rank of a pipeline stage in a training step."""

    def __init__(self, shape: MoeShape, layout: Layout, step: TrainingStep, stage: int) -> None:
        self.shape, self.layout, self.step, self.stage = shape, layout, step, stage
        self.precision = choose_precision(step.precision, step.optimizer)
        self.blocks = BlockBytes(shape, step.tokens, layout, self.precision)
        self.local = stage_parameters(shape, layout, stage)
        self.dense_shares = _shares(layout.zero, layout.dense_data)
        self.expert_shares = _shares(layout.zero, layout.expert_data)
        self.in_flight = min(layout.pipeline - stage, step.num_micro_batches)

    def _shared(self, which: int) -> float:
        """Parameters of this rank after ZeRO shared weights (0), gradients (1) or states (2)."""
        return self.local.dense / self.dense_shares[which] + self.local.experts / self.expert_shares[which]

    def peak(self) -> Memory:
        """The worst operation's backward."""
        groups = self._groups()
        waiting = [self._waiting(group, is_layer) for group, is_layer in groups]
        resident = {
            "weights": self._shared(0) * self.precision.weight,
            "optimizer": self._shared(2) * self.precision.optimizer,
        }
        # Gradients of earlier micro-batches are there from the start.
        accumulated = self.step.num_micro_batches > 1
        gradients = self._shared(1) * self.precision.gradient if accumulated else 0.0
        exchange = self._exchange_buffers()
        others = (self.in_flight - 1) * sum(waiting)
        best = Memory(
            Buckets(**resident, gradients=self._shared(1) * self.precision.gradient, exchange=exchange),
            "optimizer step", self.stage,
        )  # fmt: skip
        remaining = others + sum(waiting)
        for (group, is_layer), own in zip(reversed(groups), reversed(waiting), strict=True):
            remaining -= own
            held = sum(operation.saved for operation in group) + self._kept_input(is_layer)
            for operation in reversed(group):
                fresh = operation.gradients * self.precision.gradient
                lasting = fresh / (self.expert_shares if operation.experts else self.dense_shares)[1]
                logits = operation.name in LOGITS
                now = Buckets(
                    **resident,
                    gradients=gradients + fresh,
                    activations=remaining + held - logits * operation.saved,
                    working=0 if logits else operation.working,
                    logits=logits * (operation.saved + operation.working),
                    exchange=exchange,
                )  # fmt: skip
                if now.total > best.total:
                    best = Memory(now, operation.name, self.stage)
                held -= operation.saved
                gradients += 0 if accumulated else lasting
        return best

    def _groups(self) -> list[tuple[list[Operation], bool]]:
        """Embedding, each layer, head, as far as this stage has them; and whether it is a layer."""
        kinds: dict[object, list[Operation]] = {}
        groups: list[tuple[list[Operation], bool]] = [(self.blocks.embedding(), False)] if self.stage == 0 else []
        for index in stage_layers(self.shape, self.layout, self.stage):
            layer = self.shape.layers[index]
            groups.append((kinds.setdefault(layer, kinds.get(layer) or self.blocks.layer(index)), True))
        return [*groups, (self.blocks.head(), False)] if self.stage == self.layout.pipeline - 1 else groups

    def _kept_input(self, is_layer: bool) -> float:
        return self.blocks.stream if is_layer and self.step.recompute == "full" else 0.0

    def _waiting(self, group: list[Operation], is_layer: bool) -> float:
        """Bytes a group keeps until its own backward begins."""
        if not is_layer or self.step.recompute == "none":
            return sum(operation.saved for operation in group)
        if self.step.recompute == "full":
            return self.blocks.stream
        return sum(operation.saved for operation in group if not operation.inner)

    def _exchange_buffers(self) -> float:
        """All-to-all rows out and in; gathered weights and a layer's whole gradients; DDP's buckets."""
        layout, precision = self.layout, self.precision
        total = self._all_to_all_rows()
        shared = layout.dense_data > 1 or layout.expert_data > 1
        if shared and layout.zero == 0 and not self.step.gradient_bucket_views:
            total += sum(
                part * precision.gradient
                for part, ranks in ((self.local.dense, layout.dense_data), (self.local.experts, layout.expert_data))
                if ranks > 1
            )
        if shared and layout.zero > 1:
            total += self._largest_layer() * precision.gradient
        if shared and layout.zero > 2:
            # This layer and the next; embeddings and head stay gathered from forward to backward.
            ends = embedding_parameters_on_rank(self.shape, layout)
            root = ends[0].total * (self.stage == 0) + ends[1].total * (self.stage == layout.pipeline - 1)
            total += (2 * self._largest_layer() + root) * precision.weight
        return total

    def _largest_layer(self) -> float:
        """Parameters of the stage's largest layer that are shared by some ranks."""
        sizes: Iterator[LocalParameters] = (
            layer_parameters_on_rank(self.shape, index, self.layout)
            for index in stage_layers(self.shape, self.layout, self.stage)
        )
        return max(
            size.dense * (self.layout.dense_data > 1) + size.experts * (self.layout.expert_data > 1) for size in sizes
        )

    def _all_to_all_rows(self) -> float:
        if self.layout.expert == 1:
            return 0.0
        rows = (
            self.blocks.num_rows(layer) * layer.expert_width(self.shape.hidden_size) for layer in self.shape.moe_layers
        )
        return 2 * max(rows) * self.precision.expert
