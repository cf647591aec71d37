"""Gradients of experts that no other rank holds, under FSDP2 and expert parallelism: divided once, in every dtype."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_moe_ext.host.blocks import iterate_experts

# FSDP2 divides these before and after the reduction (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).
_DIVIDED_TWICE = (torch.float16, torch.float64)


def divide_expert_gradients_once(model: nn.Module, layout: Any) -> None:
    """Mend the gradients of experts that no other rank holds, in float16 and float64.

    Where each expert is on one rank only (``efsdp_size`` 1), torch 2.13 divides their float16 and float64 gradients by
    Transformers' divide factor twice (``foreach_reduce``: around the reduction, and in place of it). Here FSDP2 divides
    by 1 and a hook divides once. float32, bfloat16 and ``fsdp_mixed_precision``, which reduces in float32, are right.
    """
    if layout.dp_size == 1 or layout.ep_size == 1 or layout.efsdp_size > 1 or layout.fsdp_mixed_precision:
        return
    for site in iterate_experts(model):
        experts = site.experts
        if isinstance(experts, FSDPModule) and next(experts.parameters()).dtype in _DIVIDED_TWICE:
            experts.set_gradient_divide_factor(1.0)
            experts.set_all_reduce_hook(_DivideBy(layout.dp_size))


class _DivideBy:
    """A hook for what a reduction leaves."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, gradient: torch.Tensor) -> None:
        gradient.div_(self.divisor)
