"""The modules that the configuration puts into a decoder layer in the place of the stock block."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from hf_moe_ext.dcca.block import DccaMoeBlock
from hf_moe_ext.ders.block import DenseFfn, UniversalMoeBlock
from hf_moe_ext.ders.experts import DersExperts
from hf_moe_ext.host.families import expert_width
from hf_moe_ext.models.configuration import DCCA, DENSE, DERS, stock_dense_layers
from hf_moe_ext.models.ders_keys import COMPLEMENT, layer_numbers
from hf_moe_ext.mup.roles import base_sizes


def exchange_block(layer: Any, index: int, config: Any, make_router: Callable[[Any], nn.Module]) -> None:
    """Put the block that ``config.moe_blocks`` names into a decoder layer; a standard one stays the stock one.

    Args:
        layer: a stock decoder layer, its weights not yet drawn.
        index: which it is.
        config: with every key resolved.
        make_router: of the family.
    """
    block = config.moe_blocks[index]
    if block == DENSE:
        if index not in stock_dense_layers(config) or config.ders_bias:
            act = ACT2FN[config.hidden_act]
            layer.mlp = DenseFfn(config.hidden_size, config.intermediate_size, act, config.ders_bias)
        return
    if block == DCCA:
        layer.mlp = DccaMoeBlock(config, make_router(config), base_sizes(config))
        return
    if not getattr(config, "norm_topk_prob", True):
        layer.mlp.gate = make_router(config)
    if block == DERS:
        _share_base(layer, index, config)


def make_ders_experts(config: Any, layer: int) -> DersExperts:
    """The experts of a layer: routed ones, and after them the universal one where it shares their base."""
    numbers = layer_numbers(config, layer)
    experts = DersExperts(
        config.hidden_size,
        expert_width(config),
        config.num_local_experts + config.ders_share_universal,
        config.hidden_act,
        bias=config.ders_bias,
        delta=config.ders_delta,
        **numbers,
        group_size=config.ders_group_size,
        seed=config.ders_seed,
        stored_positions=config.ders_stored_positions,
        layer=layer,
        forward_path=config.ders_forward,
        hold_positions=config.ders_hold_positions,
    )
    experts.config = config  # as stock experts have it: who adapts them reads the routing there
    return experts


def _share_base(layer: Any, index: int, config: Any) -> None:
    """The stock block with other experts; where an expert serves every token, a block that gives it its gate."""
    experts = make_ders_experts(config, index)
    width = config.moe_shared_expert_intermediate_size
    if not width:
        layer.mlp.experts = experts
        return
    shared = None
    if not config.ders_share_universal:
        shared = DenseFfn(config.hidden_size, width, ACT2FN[config.hidden_act], config.ders_bias)
    complement = config.ders_universal_gate == COMPLEMENT
    noise = getattr(config, "router_jitter_noise", 0.0)  # Mixtral's
    layer.mlp = UniversalMoeBlock(layer.mlp.gate, experts, shared, complement, noise)


def draw_shared_base(experts: DersExperts, std: float, factors: Mapping[str, float]) -> None:
    """Base as stock experts are drawn, biases zero, deltas by their own law; what came from a checkpoint stays."""
    bases = (experts.first_name, "down_proj")
    for name in bases:
        init.normal_(getattr(experts, name), mean=0.0, std=std * factors.get(name, 1.0))
        if experts.has_bias:
            init.zeros_(getattr(experts, f"{name}_bias"))
    tensors = {**dict(experts.named_parameters()), **dict(experts.named_buffers())}
    read = {name: tensor for name, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    if tensors.keys() <= read.keys() | set(bases):
        return
    kept = {name: tensor.clone() for name, tensor in read.items()}
    experts.reset_deltas()
    for name, values in kept.items():
        tensors[name].copy_(values)
