"""What stands around shared-base experts: an ordinary FFN, and a block with an expert that every token passes.

The universal FFN of the paper's extended form is one more member of the experts' base (``shares_base``), the last of every
stack, or a whole FFN of its own. Its gate beside the routed ones, with s_1 the token's largest softmax probability:

* "complement" (XFT, arXiv 2404.15247): universal 1 - s_1, routed gates, which sum to 1, times s_1. All sum to 1, so a block
  whose members are copies of one FFN is that FFN; and the router has a gradient with one expert a token, too.
* "add": universal 1, routed gates as they are; such a block starts as (1 + sum of gates) times the FFN.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_moe_ext.ders.experts import DersExperts


class DenseFfn(nn.Module):
    """``down(act(gate x) * up x)``, as dense models have it.

    Args:
        hidden_size: width of the model.
        intermediate_size: inner width.
        act: on the gate.
        bias: in all three.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, act: Callable[[Tensor], Tensor], bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class UniversalMoeBlock(nn.Module):
    """Routed experts with a shared base beside an expert for every token: [batch, sequence, hidden] to the same shape.

    Args:
        gate: top-k router; called with [tokens, hidden], returns (logits, weights, ids).
        experts: with ``shared_expert=None``, their last member is the universal one, and the router knows of one less.
        shared_expert: the universal FFN, where it does not share the base.
        complement: the universal gate is 1 - s_1; False: 1.
        jitter_noise: Mixtral's, on the block's input in training.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: DersExperts,
        shared_expert: nn.Module | None,
        complement: bool,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        if shared_expert is not None:
            self.shared_expert = shared_expert
        self.shares_base, self.complement, self.jitter_noise = shared_expert is None, complement, jitter_noise
        self.num_always_active = int(self.shares_base)  # experts for every token, the last of the stack

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, experts, and the universal one."""
        shape = hidden_states.shape
        if self.training and self.jitter_noise > 0:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        tokens = hidden_states.reshape(-1, shape[-1])
        logits, weights, index = self.gate(tokens)
        own, weights = universal_gates(logits, weights, self.complement)
        if self.shares_base:
            last = torch.full_like(index[:, :1], logits.shape[-1])
            output = self.experts(tokens, torch.cat([index, last], dim=-1), torch.cat([weights, own], dim=-1))
        else:
            output = self.experts(tokens, index, weights) + (own * self.shared_expert(tokens)).to(tokens.dtype)
        return output.reshape(shape)


def universal_gates(logits: Tensor, weights: Tensor, complement: bool) -> tuple[Tensor, Tensor]:
    """The universal expert's gate [tokens, 1] and the routed ones [tokens, top_k] beside it.

    Args:
        logits: the router's [tokens, num_experts].
        weights: routed gates [tokens, top_k]; with ``complement`` they sum to 1.
        complement: see the module.
    """
    if not complement:
        return torch.ones_like(weights[:, :1]), weights
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = torch.softmax(logits.to(wide), dim=-1).amax(dim=-1, keepdim=True)
    weights = weights.to(wide) * largest
    return 1 - largest, weights
