"""What differs between families and cannot be read off the modules.

Which families are served is decided by structure (``host/blocks.py``), not here. This table answers one question: do the
weights of the experts that the base router chose sum to 1 (before any scaling factor)? PERFT-R's own router is always a
softmax over all adapters taken before top-k; "as the base model does" then means:

* softmax, then top-k (OLMoE, Qwen): renormalised where the base's configuration says so.
* top-k, then softmax over the k (GPT-OSS, Granite): the same numbers as softmax, top-k, renormalise; so renormalised.
* sigmoid scores (DeepSeek-V3, GLM-4, MiniMax-M2): renormalised where the base divides by the sum. Its scaling factor
  (``routed_scaling_factor``) is left out: that is what ``lora_alpha`` is for.

E needs no rule: it gets the base router's weights themselves, scaling included. Some blocks scale, norm or up-project the
experts' output afterwards (Nemotron-H with a latent width, Laguna, MiniMax-M3); the adapters' output goes with it.
"""

from typing import Any

from torch import nn

ALWAYS, NEVER, BY_KEY = True, False, "norm_topk_prob"
# Sigmoid scores (DeepSeek-V4: square root of softplus), divided by the sum; DeepSeek-V4 ignores its norm_topk_prob.
_SIGMOID_ALWAYS = (
    "afmoe",
    "deepseek_v4",
    "dots3_note_vision_encoder",
    "hy_v3",
    "inkling2_text",
    "laguna",
    "minimax_m2",
    "minimax_m3_vl_text",
    "muse_spark_text",
    "step3p5",
)
# Sigmoid scores, divided by the sum where the configuration says so.
_SIGMOID_BY_KEY = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note_text",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "kolibri1",
    "lfm2_moe",
    "mimo_v2_flash",
    "nemotron_h",
    "solar_open",
)
# model_type of the configuration the experts were built with -> always, never, or the key that decides.
FAMILIES: dict[str, bool | str] = {
    # softmax over all, divided by the sum of the chosen
    **dict.fromkeys(
        (
            "diffusion_gemma_text",
            "ernie4_5_moe",
            "ernie4_5_vl_moe_text",
            "gemma4_text",
            "hunyuan_v1_moe",
            "minimax",
            "mistral_large4_text",
            "mixtral",
            "qwen3_5_moe_text",
            "qwen3_vl_moe_text",
        ),
        ALWAYS,
    ),
    # top-k, then softmax of the k
    **dict.fromkeys(
        (
            "aria_text",
            "gpt_oss",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
            "openai_privacy_filter",
        ),
        ALWAYS,
    ),
    **dict.fromkeys(_SIGMOID_ALWAYS, ALWAYS),
    # softmax over all, then top-k
    **dict.fromkeys(
        (
            "flex_olmo",
            "mellum",
            "mixtral_ext",  # by default renormalised, as Mixtral
            "mistral4",
            "olmoe",
            "olmoe_ext",
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_moe_ext",
            "qwen3_next",
            "qwen3_omni_moe_talker_text",
            "qwen3_omni_moe_text",
            "qwen4_exp_text",
        ),
        BY_KEY,
    ),
    **dict.fromkeys(_SIGMOID_BY_KEY, BY_KEY),
    # probabilities as they are; DeepSeek-V2 ignores its norm_topk_prob, Inkling's sum to 1 only with the shared experts
    **dict.fromkeys(
        (
            "deepseek_ocr2_text",
            "deepseek_v2",
            "inkling_text",
            "jamba",
            "longcat_flash",
            "phimoe",
            "unlimited_ocr_text",
            "zaya",
        ),
        NEVER,
    ),
}

ACTIVE_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts")


def normalizes_top_k(experts: nn.Module, model_config: Any = None) -> bool:
    """Whether the router in front of these experts gives weights that sum to 1.

    Args:
        experts: the experts module; its own ``config`` decides, which in a composite model is that of the text part.
        model_config: the model's configuration, for the few experts that keep none (DBRX, LongCat).

    Raises:
        ValueError: the family is not in the table and its configuration has no ``norm_topk_prob``.
    """
    config: Any = getattr(experts, "config", model_config)
    value = router_normalizes(config)
    if value is None:
        raise ValueError(
            f"PerftConfig: normalize_top_k=None follows the base model's router, but that of {type(experts).__name__} "
            f"(model_type {getattr(config, 'model_type', None)!r}) is not known; write normalize_top_k=True or False"
        )
    return value


def router_normalizes(config: Any) -> bool | None:
    """The same from the configuration of the part that has the experts; None if it does not say."""
    model_type = str(getattr(config, "model_type", None))
    if model_type == "cohere2_moe":
        return config.expert_selection_fn == "softmax" or bool(config.norm_topk_prob)
    if model_type == "dbrx":
        return config.ffn_config.moe_normalize_expert_weights == 1.0  # the p of a p-norm
    rule = FAMILIES.get(model_type, BY_KEY)
    value = rule if isinstance(rule, bool) else getattr(config, rule, None)
    return None if value is None else bool(value)


def router_scoring(config: Any) -> str:
    """How the router before the experts of this configuration makes scores of its logits.

    Returns:
        "softmax", "sigmoid" or "sqrtsoftplus". Where the softmax is taken of the chosen logits only, it is "softmax" too.
    """
    own = getattr(config, "scoring_func", None) or getattr(config, "expert_selection_fn", None)
    if own in ("softmax", "sigmoid", "sqrtsoftplus"):
        return own
    model_type = str(getattr(config, "model_type", None))
    sigmoid = model_type in _SIGMOID_ALWAYS or model_type in _SIGMOID_BY_KEY or model_type == "inkling_text"
    return "sigmoid" if sigmoid else "softmax"


def expert_width(config: Any) -> int:
    """Inner width of a routed expert as the configuration says; ``intermediate_size`` may be that of dense layers."""
    width = getattr(config, "moe_intermediate_size", None)
    return config.intermediate_size if width is None else width


def active_experts(experts: nn.Module) -> int | None:
    """Experts per token of the base model, as its configuration says; None if it does not."""
    config = getattr(experts, "config", None)
    values = (getattr(config, key, None) for key in ACTIVE_KEYS)
    return next((value for value in values if isinstance(value, int)), None)


def loss_shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss predicts token i+1 at position i: the Trainer's own rule for counting loss tokens."""
    # Here, not above: this module is loaded in the middle of Transformers' own import.
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    loss_type = str(getattr(model, "loss_type", None))
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not encoder_decoder


def loss_counts_items(model: nn.Module) -> bool:
    """Whether the model's loss divides by ``num_items_in_batch``; heads for classification take it and ignore it."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

    # An unknown type falls back to the causal loss, in Transformers too.
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None)), ForCausalLMLoss) in (
        ForCausalLMLoss,
        ForMaskedLMLoss,
    )
