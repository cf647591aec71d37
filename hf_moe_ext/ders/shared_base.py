"""The weights of one layer's experts, as the pure functions of both forwards take them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_moe_ext.ders.delta_stacks import DeltaStack


@dataclass(frozen=True, eq=False)
class SharedBaseExperts:
    """The weights of one layer's experts.

    Attributes:
        first: base [2 * inner, hidden], gate rows before up rows; un-gated [inner, hidden].
        down: base [hidden, inner].
        deltas: of each matrix in the order of ``first``, then down: (gate, up, down) or (up, down).
        act: on the gate, or on the un-gated expert's one input.
        first_bias: [num_experts, 2 * inner] or [num_experts, inner]; None without.
        down_bias: [num_experts, hidden]; None without.
    """

    first: Tensor
    down: Tensor
    deltas: tuple[DeltaStack, ...]
    act: Callable[[Tensor], Tensor]
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """How many experts share the base."""
        return self.deltas[0].num_experts

    @property
    def inner_size(self) -> int:
        """Inner width of an expert."""
        return self.down.shape[1]

    def split_first_bias(self) -> tuple[Tensor | None, ...]:
        """Of gate and up, or of up alone: [num_experts, inner] each."""
        count = len(self.deltas) - 1
        return (None,) * count if self.first_bias is None else self.first_bias.chunk(count, dim=-1)

    def activate(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Gate and up, or up alone, each [..., inner], to the inner rows."""
        return self.act(parts[0]) * parts[1] if len(parts) == 2 else self.act(parts[0])
