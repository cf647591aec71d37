"""What differs between families and cannot be read off the modules: how the base router weighs its chosen experts."""

from typing import Any

from torch import nn

FAMILIES = {"olmoe": "norm_topk_prob", "mixtral": True}


def normalizes_top_k(experts: nn.Module) -> bool:
    config: Any = getattr(experts, "config", None)
    rule = FAMILIES[config.model_type]
    return rule if isinstance(rule, bool) else bool(getattr(config, rule))


def active_experts(experts: nn.Module) -> int | None:
    config: Any = getattr(experts, "config", None)
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def loss_shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss predicts token i+1 at position i (the Trainer's own rule for counting loss tokens)."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    try:
        loss_type = getattr(model, "loss_type", None)
    except Exception:
        return False
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not encoder_decoder
