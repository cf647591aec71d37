"""Parameters, bits and break-even points of DeRS (arXiv 2503.01359): a shared base plus a light delta per expert.

Parameters are counted as the paper prints them: added to the dense parent (so the base is free), values only (no indices,
scales or seeds). Bits and break-even points count everything that is stored. Plain numbers, no tensors.

Symbols: d ``hidden_size``, d_h ``intermediate_size``, L ``num_layers`` with experts, m ``num_matrices`` of an FFN, N
``num_experts``, M ``num_members`` that share a base (N, or N + 1 with the universal FFN among them), p ``drop_rate``,
r ``rank``, b ``bits``, K ``DENSE_BITS`` of a dense entry, G ``group_size``, S = d d_h.
"""

from dataclasses import dataclass
from typing import Literal

DENSE_BITS = 16

Router = Literal["linear", "xft"]
IndexForm = Literal["seed", "uint16", "int32", "int64", "bitmap"]
INDEX_BYTES: dict[str, int] = {"seed": 0, "uint16": 2, "int32": 4, "int64": 8}
INDEX_FORMS: tuple[IndexForm, ...] = ("seed", "uint16", "int32", "int64", "bitmap")


@dataclass(frozen=True)
class DersGeometry:
    """The FFNs of a dense parent that become experts.

    Attributes:
        hidden_size: d.
        intermediate_size: d_h.
        num_layers: L, layers with experts.
        num_matrices: m, 3 gated (gate and up are two matrices), else 2.
        ffn_bias: whether the FFN's two linear maps have biases; they are copied per member, never shared.
        router: "linear": d N. "xft": d N, tanh, N N and a noise map d N, without biases (arXiv 2404.15247).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_matrices: int = 3
    ffn_bias: bool = False
    router: Router = "linear"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_matrices not in (2, 3):
            raise ValueError(f"num_matrices must be 2 (fc1, fc2) or 3 (gate, up, down), got {self.num_matrices}")
        if self.router not in ("linear", "xft"):
            raise ValueError(f"router must be 'linear' or 'xft', got {self.router!r}")

    @property
    def ffn_parameters(self) -> int:
        """F_L = m d d_h L, without biases."""
        return self.num_matrices * self.hidden_size * self.intermediate_size * self.num_layers

    @property
    def bias_parameters(self) -> int:
        """(d + d_h) L where the parent has biases, else 0."""
        return (self.hidden_size + self.intermediate_size) * self.num_layers if self.ffn_bias else 0

    @property
    def universal_parameters(self) -> int:
        """A whole universal FFN in every layer, biases included: a summand of its own where it shares no base."""
        return self.ffn_parameters + self.bias_parameters

    def router_parameters(self, num_experts: int) -> int:
        """Of all layers."""
        linear = self.hidden_size * num_experts
        return self.num_layers * (linear if self.router == "linear" else 2 * linear + num_experts**2)


# --- Parameters added to the dense parent ------------------------------------------------------------------------------


def vanilla_parameters(geometry: DersGeometry, num_experts: int, extended: bool = False) -> int:
    """(M - 1)(F_L + bias_L) + router_L: full copies; ``extended`` counts the universal FFN among the members."""
    copies = _count_members(num_experts, extended) - 1
    return copies * (geometry.ffn_parameters + geometry.bias_parameters) + geometry.router_parameters(num_experts)


def sparse_parameters(geometry: DersGeometry, num_experts: int, drop_rate: float, extended: bool = False) -> float:
    """M (1 - p) F_L + (M - 1) bias_L + router_L; real-valued, an implementation rounds n per matrix."""
    _check_open("drop_rate", drop_rate)
    return _delta_parameters(geometry, num_experts, extended, (1 - drop_rate) * geometry.ffn_parameters)


def low_rank_parameters(geometry: DersGeometry, num_experts: int, rank: int, extended: bool = False) -> int:
    """M r (d + d_h) m L + (M - 1) bias_L + router_L."""
    smaller = min(geometry.hidden_size, geometry.intermediate_size)
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank must be at least 1 and at most {smaller}, the smaller dimension, got {rank}")
    both = geometry.hidden_size + geometry.intermediate_size
    return int(
        _delta_parameters(geometry, num_experts, extended, rank * both * geometry.num_matrices * geometry.num_layers)
    )


def quantized_parameters(geometry: DersGeometry, num_experts: int, bits: int, extended: bool = False) -> float:
    """M (b / 16) F_L + (M - 1) bias_L + router_L, in parameters of 16 bits; scales not counted, as the paper has it."""
    _check_bits(bits)
    return _delta_parameters(geometry, num_experts, extended, bits / DENSE_BITS * geometry.ffn_parameters)


def _delta_parameters(geometry: DersGeometry, num_experts: int, extended: bool, per_member: float) -> float:
    members = _count_members(num_experts, extended)
    return members * per_member + (members - 1) * geometry.bias_parameters + geometry.router_parameters(num_experts)


def _count_members(num_experts: int, extended: bool) -> int:
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return num_experts + 1 if extended else num_experts


# --- Stored bits and break-even ----------------------------------------------------------------------------------------


def kept_entry_ratio(index_form: IndexForm, value_bytes: float = 2) -> float:
    """Cost c = (t + index bytes) / t of a kept entry in dense entries of t bytes; 16 bytes a trainable one.

    Raises:
        ValueError: an unknown form, or "bitmap", whose cost is per position and not per kept entry.
    """
    if index_form not in INDEX_BYTES:
        raise ValueError(f"index_form must be one of {', '.join(INDEX_BYTES)}, got {index_form!r}")
    return (value_bytes + INDEX_BYTES[index_form]) / value_bytes


def sparse_bits_per_position(num_experts: int, drop_rate: float, index_form: IndexForm) -> float:
    """Base and N sparse deltas, per entry of the base: K + N K c (1 - p); bitmap K + N + N K (1 - p)."""
    _check_open("drop_rate", drop_rate)
    if index_form == "bitmap":
        return DENSE_BITS + num_experts + num_experts * DENSE_BITS * (1 - drop_rate)
    return DENSE_BITS + num_experts * DENSE_BITS * kept_entry_ratio(index_form) * (1 - drop_rate)


def break_even_drop_rate(num_experts: int, index_form: IndexForm, value_bytes: float = 2) -> float:
    """Rate above which base and N sparse deltas are smaller than N dense experts: 1 - (N - 1) / (N c).

    Bitmap: 1 / N + 1 / (8 t), t bytes a value. N = 1 gives 1 or more: nothing can be saved.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if index_form == "bitmap":
        return 1 / num_experts + 1 / (8 * value_bytes)
    return 1 - (num_experts - 1) / (num_experts * kept_entry_ratio(index_form, value_bytes))


def bitmap_break_even_drop_rate(index_form: IndexForm) -> float:
    """Rate below which a bitmap is smaller than stored indices: one bit a position against the index's bits (1 - p)."""
    if not INDEX_BYTES.get(index_form):
        raise ValueError(f"index_form must be uint16, int32 or int64 to be compared with a bitmap, got {index_form!r}")
    return 1 - 1 / (8 * INDEX_BYTES[index_form])


def break_even_rank(num_experts: int, hidden_size: int, intermediate_size: int) -> float:
    """Rank below which base and N low-rank deltas are smaller than N dense experts: (N - 1) / N d d_h / (d + d_h)."""
    return (num_experts - 1) / num_experts * hidden_size * intermediate_size / (hidden_size + intermediate_size)


def quantized_bits_per_entry(bits: int, group_bits: float = 16, group_size: int = 128) -> float:
    """Stored bits b + s / G, with s bits of scale (and zero point) per group of G entries."""
    _check_bits(bits)
    return bits if bits == DENSE_BITS else bits + group_bits / group_size


def break_even_bits(num_experts: int) -> float:
    """Bits per entry below which base and N quantised deltas are smaller than N dense experts: K (N - 1) / N."""
    return DENSE_BITS * (num_experts - 1) / num_experts


def _check_open(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def _check_bits(bits: int) -> None:
    if bits not in (16, 8, 4, 2, 1):
        raise ValueError(f"bits must be one of 16, 8, 4, 2, 1, got {bits}")
