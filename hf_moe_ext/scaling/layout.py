"""How a model is spread over ranks, and what of its parameters one rank holds.

Symbols: TP ``tensor``, CP ``context``, DP ``data``, PP ``pipeline``; of the experts EP ``expert``, ETP ``expert_tensor`` and
EDP ``expert_data``, which follows: world = TP CP DP PP = ETP EP EDP PP.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from hf_moe_ext.scaling.attention import GroupedAttention, LatentAttention
from hf_moe_ext.scaling.exchange import IMPLEMENTATIONS, Implementation
from hf_moe_ext.scaling.feed_forward import DenseFfn, MoeFfn
from hf_moe_ext.scaling.shape import MoeShape
from hf_moe_ext.scaling.size_checks import check_at_least

Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Layout:
    """Parallel degrees.

    Attributes:
        data: DP, ranks that see other tokens; with ``zero`` they also share states.
        expert: EP, ranks that share the experts of a layer.
        tensor: TP, ranks that share every matrix outside the experts.
        pipeline: PP, stages of equally many layers.
        context: CP, ranks that share a sequence.
        expert_tensor: ETP, ranks that share an expert's matrices.
        zero: what DP ranks share: 0 nothing (DDP), 1 optimizer states, 2 gradients too, 3 weights too (= FSDP).
        dispatch: how experts on other ranks are reached.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert_tensor: int = 1
    zero: Zero = 0
    dispatch: Implementation = "all_to_all"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "data", "expert", "tensor", "pipeline", "context", "expert_tensor")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"Layout: zero must be 0, 1, 2 or 3, got {self.zero!r}")
        if self.dispatch not in IMPLEMENTATIONS:
            raise ValueError(f"Layout: dispatch must be one of {', '.join(IMPLEMENTATIONS)}, got {self.dispatch!r}")
        ranks, shared = self.tensor * self.context * self.data, self.expert_tensor * self.expert
        if ranks % shared:
            raise ValueError(
                f"Layout: expert * expert_tensor must divide tensor * context * data = {ranks}, the ranks of a stage, got "
                f"{shared}"
            )

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_data(self) -> int:
        """EDP, ranks that hold the same experts: they alone share the experts' states."""
        return self.tensor * self.context * self.data // (self.expert_tensor * self.expert)

    @property
    def row_share(self) -> float:
        """ETP / TP: ranks of TP hold the same tokens, and share the work of routing them unless they share each expert."""
        return self.expert_tensor / self.tensor

    @property
    def dense_data(self) -> int:
        """Ranks that hold the same parameters outside the experts: DP, and CP beside it."""
        return self.data * self.context

    def check(self, shape: MoeShape) -> None:
        """Whether the model can be cut like this.

        Raises:
            ValueError: a degree does not divide what it cuts.
        """
        for name, degree, what, size in _cuts(shape, self):
            if size % degree:
                raise ValueError(f"Layout: {name} must divide {what}={size}, got {degree}")


def _cuts(shape: MoeShape, layout: Layout) -> list[tuple[str, int, str, int]]:
    cuts = [("pipeline", layout.pipeline, "num_layers", shape.num_layers)]
    cuts.append(("tensor", layout.tensor, "num_heads", shape.attention.num_heads))
    if isinstance(shape.attention, GroupedAttention):
        cuts.append(("tensor", layout.tensor, "num_key_value_heads", shape.attention.num_key_value_heads))
    for layer in dict.fromkeys(shape.layers):
        if isinstance(layer, MoeFfn):
            cuts.append(("expert", layout.expert, "num_experts", layer.num_experts))
            cuts.append(("expert_tensor", layout.expert_tensor, "intermediate_size", layer.intermediate_size))
        else:
            cuts.append(("tensor", layout.tensor, "intermediate_size", layer.intermediate_size))
    if layout.expert > 1 and not shape.moe_layers:
        cuts.append(("expert", layout.expert, "num_experts (the model has none)", 1))
    return cuts


@dataclass(frozen=True)
class LocalParameters:
    """What one rank holds before ZeRO shares it.

    Attributes:
        dense: shared by DP ranks: everything but the routed experts.
        experts: shared by EDP ranks: routed experts.
    """

    dense: float
    experts: float

    @property
    def total(self) -> float:
        """Both."""
        return self.dense + self.experts

    def __add__(self, other: "LocalParameters") -> "LocalParameters":
        """Of two parts of a model."""
        return LocalParameters(self.dense + other.dense, self.experts + other.experts)


def layer_parameters_on_rank(shape: MoeShape, index: int, layout: Layout) -> LocalParameters:
    """Of one layer: matrices outside the experts over TP, router and norms whole, experts over EP and ETP.

    A base that experts share (DeRS) is on every rank of EP; its deltas are spread.
    """
    d, layer = shape.hidden_size, shape.layers[index]
    dense = shape.attention.matrix_parameters(d) / layout.tensor
    dense += shape.attention.vector_parameters(d) + shape.layer_norms * d
    if not isinstance(layer, MoeFfn):
        return LocalParameters(dense + layer.matrix_parameters(d) / layout.tensor + layer.vector_parameters(d), 0)
    dense += layer.router_parameters(d) + layer.projection_parameters(d) + layer.shared_parameters(d) / layout.tensor
    base = 0
    if layer.deltas is not None:
        base = DenseFfn(layer.intermediate_size, layer.gated).matrix_parameters(layer.expert_width(d))
    spread = (layer.routed_parameters(d) - base) / (layout.expert * layout.expert_tensor)
    return LocalParameters(dense + base, spread)


def embedding_parameters_on_rank(shape: MoeShape, layout: Layout) -> tuple[LocalParameters, LocalParameters]:
    """Of the first stage (input embedding) and of the last (final norm, un-embedding); a tied one is on both."""
    embedding = shape.vocab_size * shape.hidden_size / layout.tensor
    own_head = layout.pipeline > 1 or not shape.tied_embeddings
    return LocalParameters(embedding, 0), LocalParameters(embedding * own_head + shape.hidden_size, 0)


def stage_layers(shape: MoeShape, layout: Layout, stage: int) -> range:
    """Indices of a stage's layers."""
    each = ceil(shape.num_layers / layout.pipeline)
    return range(stage * each, (stage + 1) * each)


def stage_parameters(shape: MoeShape, layout: Layout, stage: int) -> LocalParameters:
    """All that one rank of a stage holds before ZeRO shares it."""
    first, last = embedding_parameters_on_rank(shape, layout)
    total = LocalParameters(0, 0)
    for index in stage_layers(shape, layout, stage):
        total += layer_parameters_on_rank(shape, index, layout)
    if stage == 0:
        total += first
    return total + last if stage == layout.pipeline - 1 else total


def cache_ranks(shape: MoeShape, layout: Layout) -> int:
    """Ranks that share a sequence's cache: stages, and TP where it holds heads; a latent cache is whole on each."""
    return layout.pipeline * (1 if isinstance(shape.attention, LatentAttention) else layout.tensor)
