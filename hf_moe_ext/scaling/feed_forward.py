"""The feed-forward part of one layer on plain numbers: dense, routed experts, latent experts, experts on a shared base.

Symbols: d ``hidden_size``, E ``num_experts``, K ``top_k``, d_e ``intermediate_size`` of an expert, R ``latent_size``.
A gated FFN has 3 matrices, a plain one 2. *Matrix* parameters are those a token is multiplied with (one multiply-add each);
*vector* parameters are biases and scales.
"""

from dataclasses import dataclass
from typing import Literal

from hf_moe_ext.scaling.layer_counts import layer_parameters
from hf_moe_ext.scaling.size_checks import check_at_least

DeltaForm = Literal["low_rank", "sparse", "quantized"]
DELTA_FORMS: tuple[DeltaForm, ...] = ("low_rank", "sparse", "quantized")
Numbers = tuple[float, ...]


def _matrix_shapes(hidden_size: int, intermediate_size: int, gated: bool) -> tuple[tuple[int, int], ...]:
    """(out, in) of gate and up, or up alone, then down."""
    up = (intermediate_size, hidden_size)
    return (up,) * (2 if gated else 1) + (up[::-1],)


@dataclass(frozen=True)
class DenseFfn:
    """An ordinary FFN, or a shared expert.

    Attributes:
        intermediate_size: its inner width.
        gated: three matrices, else two.
        bias: biases on each matrix.
    """

    intermediate_size: int
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "intermediate_size")

    def matrix_parameters(self, hidden_size: int) -> int:
        """3 d d_ff gated, else 2 d d_ff."""
        return (3 if self.gated else 2) * hidden_size * self.intermediate_size

    def vector_parameters(self, hidden_size: int) -> int:
        """Biases."""
        wide = self.intermediate_size * (2 if self.gated else 1)
        return (wide + hidden_size) * self.bias


@dataclass(frozen=True)
class Deltas:
    """Light deltas on one shared base (DeRS, arXiv 2503.01359).

    Attributes:
        form: how a delta is stored.
        rank: of low-rank deltas, one number per matrix (gate, up, down; un-gated up, down).
        drop_rate: share of zeros of sparse ones, one per matrix.
        bits: of an entry of quantised deltas, or of a sparse delta's kept values; one per matrix.
        share_universal: the shared expert is one more delta on the same base.
    """

    form: DeltaForm
    rank: tuple[int, ...] = ()
    drop_rate: Numbers = ()
    bits: tuple[int, ...] = ()
    share_universal: bool = False

    def __post_init__(self) -> None:
        if self.form not in DELTA_FORMS:
            raise ValueError(f"deltas: form must be one of {', '.join(DELTA_FORMS)}, got {self.form!r}")
        name = {"low_rank": "rank", "sparse": "drop_rate", "quantized": "bits"}[self.form]
        if len(getattr(self, name)) not in (2, 3):
            raise ValueError(
                f"deltas of form {self.form!r} need {name}, one number per matrix, got {getattr(self, name)}"
            )

    def trainable_entries(self, shapes: tuple[tuple[int, int], ...]) -> int:
        """Parameters of one expert's delta: r (out + in) low-rank, kept values sparse; codes are none."""
        if self.form == "low_rank":
            return sum(r * (out + into) for r, (out, into) in zip(self.rank, shapes, strict=True))
        if self.form == "sparse" and not self.bits:
            return sum(round(out * into * (1 - p)) for p, (out, into) in zip(self.drop_rate, shapes, strict=True))
        return 0

    def multiply_adds(self, shapes: tuple[tuple[int, int], ...]) -> int:
        """Of one expert's delta and one token, beside the base; sparse and quantised ones run as dense matrices."""
        if self.form == "low_rank":
            return self.trainable_entries(shapes)
        return sum(out * into for out, into in shapes)


@dataclass(frozen=True)
class MoeFfn:
    """Router and routed experts, with what every token passes besides.

    Attributes:
        num_experts: E.
        top_k: K.
        intermediate_size: d_e, inner width of one expert.
        gated: an expert has three matrices, else two.
        bias: an expert has biases.
        router_bias: the router has one (GPT-OSS).
        shared: expert that every token passes.
        shared_gate: a gate vector of width d on it (Qwen2-MoE).
        latent_size: R; experts read and write this width (DCCA): descend and ascend beside them.
        latent_norm: a norm on the latent.
        deltas: experts are one shared base and these (DeRS).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    gated: bool = True
    bias: bool = False
    router_bias: bool = False
    shared: DenseFfn | None = None
    shared_gate: bool = False
    latent_size: int | None = None
    latent_norm: bool = False
    deltas: Deltas | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_experts", "top_k", "intermediate_size", "latent_size")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}")
        if self.deltas is not None and self.latent_size is not None:
            raise ValueError("experts have either latent_size (DCCA) or deltas (DeRS), got both")

    def expert_width(self, hidden_size: int) -> int:
        """What an expert reads and writes: d, or R."""
        return hidden_size if self.latent_size is None else self.latent_size

    def routed_parameters(self, hidden_size: int) -> int:
        """All routed experts, biases included."""
        return self._experts(hidden_size, self.num_experts)

    def active_routed_parameters(self, hidden_size: int) -> int:
        """Those of one token's K experts; a shared base is used whole."""
        return self._experts(hidden_size, self.top_k)

    def _experts(self, hidden_size: int, num_experts: int) -> int:
        width = self.expert_width(hidden_size)
        one = DenseFfn(self.intermediate_size, self.gated, self.bias)
        if self.deltas is None:
            block: Literal["standard", "dcca"] = "standard" if self.latent_size is None else "dcca"
            stored = layer_parameters(
                block, hidden_size, num_experts, self.intermediate_size, self.latent_size, self.gated
            )
            return stored.experts + num_experts * one.vector_parameters(width)
        members = num_experts + self.deltas.share_universal
        entries = self.deltas.trainable_entries(self._shapes(hidden_size)) + one.vector_parameters(width)
        return one.matrix_parameters(width) + members * entries

    def _shapes(self, hidden_size: int) -> tuple[tuple[int, int], ...]:
        return _matrix_shapes(self.expert_width(hidden_size), self.intermediate_size, self.gated)

    def router_parameters(self, hidden_size: int) -> int:
        """D E, and a bias of E."""
        return self.num_experts * (hidden_size + self.router_bias)

    def shared_parameters(self, hidden_size: int) -> int:
        """The shared expert, its gate included; none where it is a delta on the experts' base."""
        if self.shared is None:
            return 0
        gate = hidden_size * self.shared_gate
        return self.shared.matrix_parameters(hidden_size) + self.shared.vector_parameters(hidden_size) + gate

    def projection_parameters(self, hidden_size: int) -> int:
        """Descend and ascend, and the latent's norm; none without a latent."""
        if self.latent_size is None:
            return 0
        return 2 * hidden_size * self.latent_size + self.latent_size * self.latent_norm

    def expert_multiply_adds(self, hidden_size: int) -> int:
        """Of one token in its K experts; a shared base is multiplied once, and once per expert only its delta."""
        width = self.expert_width(hidden_size)
        whole = DenseFfn(self.intermediate_size, self.gated).matrix_parameters(width)
        if self.deltas is None:
            return self.top_k * whole
        members = self.top_k + self.deltas.share_universal
        return whole + members * self.deltas.multiply_adds(self._shapes(hidden_size))


FeedForward = DenseFfn | MoeFfn
