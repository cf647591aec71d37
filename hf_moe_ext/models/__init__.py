"""Mixtral-, OLMoE- and Qwen3-MoE-style models whose MoE block and parametrisation are chosen by their configuration.

``OlmoeExtConfig``, ``MixtralExtConfig`` and ``Qwen3MoeExtConfig`` are the stock configurations with a few more keys; with these at their
defaults the models are the stock ones, parameter by parameter. ``moe_block="dcca"``, for all layers or some of them,
puts the latent block of ``hf_moe_ext.dcca`` in the place of the stock one; ``"ders"`` gives the stock block the experts of
``hf_moe_ext.ders``, which share a base; ``"dense"`` puts an ordinary FFN there.

| key | default | meaning |
|---|---|---|
| ``moe_block`` | ``"standard"`` | ``"standard"``, ``"dcca"``, ``"ders"``, ``"dense"``, or a list with one per layer |
| ``moe_latent_size`` | ``hidden_size // 4`` | width R in which tokens travel and experts work |
| ``moe_expert_gated`` | ``False`` | gated experts (three matrices) instead of the paper's un-gated ones (two) |
| ``moe_expert_intermediate_size`` | equal parameters | width F inside an expert: 3HI = 2RF un-gated, 3RF gated |
| ``moe_expert_act`` | ``hidden_act`` | activation of the latent experts |
| ``moe_latent_norm`` | ``False`` | RMSNorm on the combined latent, before ascend |
| ``moe_shared_expert_intermediate_size`` | 0 | width of a full-width expert that every token passes; 0: none |
| ``ders_delta`` | ``"low_rank"`` | form of the experts' deltas; ``"sparse"``, ``"quantized"`` |
| ``ders_rank`` | 4 with ``"low_rank"`` | a number, a mapping ``{"gate", "up", "down"}``, or a list of these per layer |
| ``ders_drop_rate`` | 0.9 with ``"sparse"`` | share of zeros; as ``ders_rank`` |
| ``ders_bits`` | 4 with ``"quantized"`` | as ``ders_rank``; with ``"sparse"``: the kept values are quantised, frozen |
| ``ders_group_size`` | 128 | inputs, or neighbouring kept values, that share a scale |
| ``ders_seed`` | 0 | of the sparse deltas' positions |
| ``ders_stored_positions`` | ``False`` | positions are stored instead of the seed |
| ``ders_bias`` | ``False`` | biases in all three matrices: of each expert, of dense layers, of the shared expert |
| ``ders_share_universal`` | ``False`` | the shared expert is the last member of the base |
| ``ders_universal_gate`` | ``"complement"`` | 1 - s_1 for the shared expert of such a layer; ``"add"``: 1 |
| ``ders_forward`` | ``"fused"`` | ``"materialised"``: each used expert's matrices built, as the paper does |
| ``ders_hold_positions`` | ``False`` | sparse positions kept in memory |
| ``ders_mask`` | filled in | name, version, checksum of the mask's algorithm; another one is refused |
| ``norm_topk_prob`` | the family's | in ``MixtralExtConfig`` too: ``False`` leaves the gates as they are |
| ``mup`` | ``"none"`` | ``"mup"``; ``"simplep"``: all but the router; see ``hf_moe_ext.mup`` |
| ``mup_form`` | ``"multiplier"`` | logits of router and head divided by the width ratio; ``"folded"``: in their weights |
| ``mup_base_hidden_size`` | needed with ``mup`` | ``hidden_size`` of the model whose learning rate was tuned |
| ``mup_base_intermediate_size`` | same ratio as the width | of that model: how wide a standard expert is |
| ``mup_base_head_dim`` | the head dimension | of that model |
| ``mup_base_latent_size`` | same ratio as the width | ``moe_latent_size`` of that model |
| ``embedding_multiplier`` | 1 | times the embedding's rows; ``inputs_embeds`` are taken as they are |
| ``attention_multiplier`` | d^-0.5, under µP sqrt(d_base) / d | times the attention logits |
| ``residual_multiplier`` | 1 | times what attention and experts add |
| ``logits_scaling`` | 1; in the multiplier form the width ratio | divides the output logits |
| ``router_logits_scaling`` | 1; with ``"mup"`` in the multiplier form the ratio | divides the router's logits |

Multipliers left open are stored as numbers, which hang on the width: leave them out of a config.json copied for another.

On disk a checkpoint has the module names, experts stacked: the Trainer reads checkpoints back that way. Checkpoints of
the stock families, one matrix per expert, are read too, and stock classes read ours where every block is standard.
``save_pretrained(folder, save_original_format=True)`` writes one matrix per expert.

Configurations are registered with ``AutoConfig`` when Transformers is imported; the model classes, which are heavy, when
the first configuration is made (see ``hf_moe_ext/registry.py`` on why not in one go).
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_moe_ext.models.configuration import MixtralExtConfig, OlmoeExtConfig, Qwen3MoeExtConfig

if TYPE_CHECKING:
    from hf_moe_ext.models.modeling import (
        MixtralExtForCausalLM,
        MixtralExtModel,
        OlmoeExtForCausalLM,
        OlmoeExtModel,
        Qwen3MoeExtForCausalLM,
        Qwen3MoeExtModel,
    )

_MODELING = (
    "MixtralExtForCausalLM",
    "MixtralExtModel",
    "OlmoeExtForCausalLM",
    "OlmoeExtModel",
    "Qwen3MoeExtForCausalLM",
    "Qwen3MoeExtModel",
)
__all__ = [
    "MixtralExtConfig",
    "MixtralExtForCausalLM",
    "MixtralExtModel",
    "OlmoeExtConfig",
    "OlmoeExtForCausalLM",
    "OlmoeExtModel",
    "Qwen3MoeExtConfig",
    "Qwen3MoeExtForCausalLM",
    "Qwen3MoeExtModel",
]


def __getattr__(name: str) -> Any:
    if name in _MODELING:
        return getattr(importlib.import_module("hf_moe_ext.models.modeling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
