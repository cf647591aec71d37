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
        post_norm: on an expert's output, before its gate; None without. With one there is no fused forward.
        gates_on_input: gates multiply the experts' inputs, and outputs are summed as they are. With it there is none either.
    """

    first: Tensor
    down: Tensor
    deltas: tuple[DeltaStack, ...]
    act: Callable[[Tensor], Tensor]
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None
    gates_on_input: bool = False

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


def refuse_fused(post_norm: object, gates_on_input: bool) -> None:
    """Raise where sum_i g_i h_i cannot stand before ``down``: its output is not used as a sum weighted by the gates.

    Raises:
        ValueError: a norm behind the experts, or gates on their inputs.
    """
    for name, given in (("post_norm", post_norm is not None), ("gates_on_input", gates_on_input)):
        if given:
            raise ValueError(
                "forward_path='fused' sums the chosen experts before down, which asks for gates on the experts' outputs and "
                f"nothing behind down; these experts have {name}: write forward_path='materialised'"
            )
