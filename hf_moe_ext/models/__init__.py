"""Mixtral- and OLMoE-style models whose MoE block and parametrisation are chosen by their configuration.

``OlmoeExtConfig`` and ``MixtralExtConfig`` are the stock configurations with a few more keys; with these at their
defaults the models are the stock ones, parameter by parameter. ``moe_block="dcca"``, for all layers or some of them,
puts the latent block of ``hf_moe_ext.dcca`` in the place of the stock one.

| key | default | meaning |
|---|---|---|
| ``moe_block`` | ``"standard"`` | ``"standard"`` or ``"dcca"``, or a list with one of them per layer |
| ``moe_latent_size`` | ``hidden_size // 4`` | width R in which tokens travel and experts work |
| ``moe_expert_gated`` | ``False`` | gated experts (three matrices) instead of the paper's un-gated ones (two) |
| ``moe_expert_intermediate_size`` | equal parameters | width F inside an expert: 3HI = 2RF un-gated, 3RF gated |
| ``moe_expert_act`` | ``hidden_act`` | activation of the latent experts |
| ``moe_latent_norm`` | ``False`` | RMSNorm on the combined latent, before ascend |
| ``moe_shared_expert_intermediate_size`` | 0 | width of a full-width expert that every token passes; 0: none |
| ``mup`` | ``"none"`` | ``"mup"``; ``"simplep"``: all but the router; see ``hf_moe_ext.mup`` |
| ``mup_form`` | ``"multiplier"`` | logits of router and head divided by the width ratio; ``"folded"``: in their weights |
| ``mup_base_hidden_size`` | needed with ``mup`` | ``hidden_size`` of the model whose learning rate was tuned |
| ``mup_base_intermediate_size`` | same ratio as the width | ``intermediate_size`` of that model |
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
