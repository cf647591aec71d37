"""What tuning costs: training FLOPs of a model that is only counted, not built."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext.host.axes import VOCAB, read_axes
from hf_moe_ext.host.blocks import iterate_experts
from hf_moe_ext.host.families import active_experts


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model.

    Attributes:
        total: all.
        active: those one token passes, without embedding and head: of the experts the chosen ones.
    """

    total: int
    active: int


def count_parameters(config: Any) -> Parameters:
    """Count on the meta device.

    Args:
        config: an ``*_ext`` configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shares = {
        f"{site.name}.": (active_experts(site.experts) or site.num_experts) / site.num_experts
        for site in iterate_experts(model)
    }
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        axes = read_axes(name, config)
        if VOCAB in (axes.fan_in, axes.fan_out):
            continue
        active += parameter.numel() * next((share for site, share in shares.items() if name.startswith(site)), 1.0)
    return Parameters(total, round(active))


def training_flops(num_active_parameters: int, num_tokens: int) -> int:
    """6 N D (arXiv 2001.08361, section 2.1): 2 forward, 4 backward per active parameter and token.

    Without embedding, head, and the products of queries with keys and of attention weights with values.
    """
    return 6 * num_active_parameters * num_tokens
