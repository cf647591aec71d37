"""An operation of a forward pass and what it holds; the tokens it is applied to."""

from dataclasses import dataclass

from hf_moe_ext.scaling.size_checks import check_at_least


@dataclass(frozen=True)
class Operation:
    """One differentiable operation of the forward pass; bytes of a micro-batch on one rank.

    Attributes:
        name: what it is.
        saved: kept from its forward until its backward has run.
        working: gradients and temporaries alive at the worst moment of its backward, those that come in included.
        gradients: parameters (a number, not bytes) whose gradient its backward makes.
        experts: those are routed experts'.
        inner: run again in backward under "selective" recomputation.
    """

    name: str
    saved: float
    working: float
    gradients: float = 0
    experts: bool = False
    inner: bool = False


@dataclass(frozen=True)
class Tokens:
    """What one rank processes at a time.

    Attributes:
        num_sequences: b, of one micro-batch.
        sequence_length: s, before context parallelism cuts it.
        imbalance: rho, at least 1.
        eager_attention: attention weights are stored; else SDPA or flash attention.
    """

    num_sequences: int
    sequence_length: int
    imbalance: float = 1.0
    eager_attention: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_sequences", "sequence_length")
        if not self.imbalance >= 1:
            raise ValueError(f"Tokens: imbalance is the busiest rank over the mean, at least 1, got {self.imbalance}")


def activation_operations(name: str, gated: bool, inner: float, held: float, split: bool) -> list[Operation]:
    """act(gate) * up, or act(up) alone; ``split``: gate and up come out of one product, and their gradients are joined."""
    if not gated:
        return [Operation(f"{name} activation", inner, held + 2 * inner, inner=True)]
    joined = [Operation(f"{name} halves", 0, held + 4 * inner, inner=True)] if split else []
    return [
        *joined,
        Operation(f"{name} activation", 2 * inner, held + 3 * inner, inner=True),
        Operation(f"{name} gating", inner, held + 3 * inner, inner=True),
    ]
