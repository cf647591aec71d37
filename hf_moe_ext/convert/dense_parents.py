"""Dense families with an exact home among the MoE families, and why the others have none.

A home is a MoE family whose attention, norms and head are those of the parent: with every expert equal to the parent's FFN
and gates that sum to 1 it computes what the parent does.

| parent | base + deltas | full copies (stock) |
|---|---|---|
| ``llama``, ``mistral`` | ``mixtral_ext`` | ``mixtral`` |
| ``granite`` | ``mixtral_ext``, whose multipliers are Granite's | none, unless its multipliers are all neutral |
| ``qwen3`` | ``qwen3_moe_ext`` | ``qwen3_moe`` |
"""

from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_moe_ext.models.configuration import ExtKeys

DERS, VANILLA = "ders", "vanilla"
_STOCK_HOMES = {"llama": "mixtral", "mistral": "mixtral", "granite": "mixtral", "qwen3": "qwen3_moe"}
# Keys that have done their work when a configuration is made, or say nothing of the computation.
_DROPPED = {"pretraining_tp", "mlp_bias", "attention_bias", "layer_types", "max_window_layers", "head_dim", "auto_map"}
_DROPPED |= {"rope_theta", "rope_scaling", "tokenizer_class", "torch_dtype", "_name_or_path", "_commit_hash"}

_POST_NORM = "its norms stand behind attention and FFN, those of the present targets before them"
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_REASONS = {
    "qwen2": "its q, k and v projections have biases, which no present target has; needed: a target with these biases",
    "olmo": "its LayerNorm has no weights, the targets' RMSNorm has; needed: a target with weightless LayerNorm",
    "olmo2": f"{_POST_NORM}, and its q and k norms span all heads; needed: a target with OLMo 2's layers",
    "olmo3": f"{_POST_NORM}, and its layers alternate between windows; needed: a target with OLMo 3's layers",
    "phi": (
        "it rotates a part of each head, has LayerNorm, biases everywhere and attention beside the FFN; needed: a target "
        "with Phi's layers and un-gated experts"
    ),
    "phi3": (
        "its q, k and v and its gate and up are one matrix each, and it may rotate a part of each head; needed: a reader "
        "that splits them, and a target with partial rotary embedding"
    ),
    "gemma": "its RMSNorm multiplies by 1 + weight and its embedding is scaled; needed: a target with Gemma's norms",
    "gemma2": (
        "it has norms before and behind each part, a soft cap on logits and alternating windows; needed: a target with "
        "Gemma 2's layers (and a norm behind the experts forbids the fused forward)"
    ),
    "gemma3_text": (
        "it has norms before and behind each part and alternating windows; needed: a target with Gemma 3's layers (and a "
        "norm behind the experts forbids the fused forward)"
    ),
    "stablelm": "it has LayerNorm with biases and rotates a part of each head; needed: a target with StableLM's layers",
    "smollm3": "some of its layers have no rotary embedding; needed: a target that can leave it out by layer",
    "ministral": "its layers alternate between windows, the target has one for all; needed: windows by layer",
    "cohere": "its LayerNorm, scaled logits and attention beside the FFN; needed: a target with Cohere's layers",
    "starcoder2": "it has LayerNorm, biases and an un-gated FFN; needed: a target with these and un-gated experts",
    "gpt2": "it has learned positions, LayerNorm and an un-gated FFN; needed: a target with these",
    "gpt_neox": "it has LayerNorm, biases and attention beside the FFN; needed: a target with these and un-gated experts",
}


@dataclass(frozen=True)
class HomeRequest:
    """What is asked of the home, beside the parent.

    Attributes:
        form: "ders" or "vanilla".
        layers: those that get experts, ascending.
        num_experts: N.
        top_k: experts per token.
        norm_topk_prob: whether gates are made to sum to 1.
        router_aux_loss_coef: of the load-balance loss.
        ders: ``ders_*`` keys, and that of a shared expert; empty for "vanilla".
    """

    form: str
    layers: list[int]
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    router_aux_loss_coef: float
    ders: dict[str, Any]


def refuse_homeless(name: str, parent: Any) -> None:
    """Refuse a parent whose family, or whose own keys, no target can hold.

    Raises:
        ValueError: with the reason and what would be needed.
    """
    kind = parent.model_type
    if kind not in _STOCK_HOMES:
        if "num_experts_per_tok" in parent.to_dict() or getattr(parent, "num_local_experts", None):
            raise ValueError(
                f"upcycle takes a dense model; {name} (model_type {kind!r}) has experts already. To store a trained MoE as "
                "base and deltas, use `hf-moe compress`"
            )
        reason = _REASONS.get(kind, "no MoE family here is known to have its attention, norms and head")
        raise ValueError(
            f"upcycle takes {', '.join(_STOCK_HOMES)}; {name} has model_type {kind!r}, which has no exact home: {reason}"
        )
    if kind in ("llama", "granite") and parent.attention_bias:
        raise ValueError(
            f"{name}: attention_bias=True, and Mixtral's attention has no biases, so no target can hold them; needed: a "
            "target with biases in q, k, v and o"
        )
    kinds = set(getattr(parent, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: its layers differ in their attention ({', '.join(sorted(kinds))}, window {parent.sliding_window}), and "
            "the target has one window for all layers; needed: a target with windows by layer"
        )


def refuse_in_stock(name: str, parent: Any, request: HomeRequest, universal: str) -> None:
    """Refuse what only the ``*_ext`` families can hold.

    Raises:
        ValueError: with the reason and what to write instead.
    """
    stock = _STOCK_HOMES[parent.model_type]
    instead = "write form='ders' (--form ders)"
    if universal != "none":
        raise ValueError(
            f"universal={universal!r} with form='vanilla': a stock {stock} model has no expert that every token passes; "
            f"{instead}, or universal='none'"
        )
    if getattr(parent, "mlp_bias", False):
        raise ValueError(
            f"{name}: mlp_bias=True, and the experts of a stock {stock} model have no biases; {instead}, which copies them "
            "per expert"
        )
    if parent.model_type == "granite" and _read_multipliers(parent) != (1, _head_dim(parent) ** -0.5, 1, 1):
        given = ", ".join(f"{key}={getattr(parent, key)}" for key in _MULTIPLIERS)
        raise ValueError(f"{name}: {given}, and a stock {stock} model has no multipliers; {instead}")
    if stock == "mixtral" and len(request.layers) < parent.num_hidden_layers:
        raise ValueError(
            f"layers: {len(request.layers)} of {parent.num_hidden_layers} with form='vanilla', but every layer of a stock "
            f"mixtral model has experts; {instead}, or layers='all'"
        )
    if stock == "mixtral" and not request.norm_topk_prob:
        raise ValueError(
            f"norm_topk_prob=False with form='vanilla': a stock mixtral model always makes its gates sum to 1; {instead}"
        )


def make_home(parent: Any, request: HomeRequest) -> Any:
    """Configuration of the result: every key of the parent that matters, and the experts'.

    Raises:
        ValueError, TypeError: a key that the target's class refuses.
    """
    stock = _STOCK_HOMES[parent.model_type]
    model_type = stock if request.form == VANILLA else f"{stock}_ext"
    target = type(AutoConfig.for_model(model_type))
    keys = _shared_keys(parent, target)
    keys["head_dim"] = _head_dim(parent)
    keys["router_aux_loss_coef"] = request.router_aux_loss_coef
    # Else the coefficient has no effect in training.
    keys["output_router_logits"] = request.router_aux_loss_coef > 0
    keys["num_experts_per_tok"] = request.top_k
    if stock == "qwen3_moe":
        keys |= {"num_experts": request.num_experts, "moe_intermediate_size": parent.intermediate_size}
        keys |= {"attention_bias": parent.attention_bias, "decoder_sparse_step": 1}
        keys |= {"use_sliding_window": parent.sliding_window is not None and "full_attention" not in parent.layer_types}
    else:
        keys["num_local_experts"] = request.num_experts
    if stock == "qwen3_moe" or request.form == DERS:
        keys["norm_topk_prob"] = request.norm_topk_prob
    whole = [i for i in range(parent.num_hidden_layers) if i not in request.layers]
    if request.form == DERS:
        keys["moe_block"] = (
            ["dense" if i in whole else DERS for i in range(parent.num_hidden_layers)] if whole else DERS
        )
        keys |= request.ders
        if parent.model_type == "granite":
            keys |= dict(zip(_MULTIPLIERS, _read_multipliers(parent), strict=True))
    elif whole:
        keys["mlp_only_layers"] = whole
    keys["architectures"] = [target.__name__.replace("Config", "ForCausalLM")]
    return target(**keys)


def list_dropped_keys(parent: Any) -> list[str]:
    """Keys of the parent's config.json that its own class does not know, and that the result does not keep."""
    known = {f.name for f in fields(type(parent))} | set(PreTrainedConfig().to_dict()) | _DROPPED
    return sorted(key for key in parent.to_dict() if key not in known and not key.startswith("_"))


def _head_dim(parent: Any) -> int:
    return getattr(parent, "head_dim", None) or parent.hidden_size // parent.num_attention_heads


def _read_multipliers(parent: Any) -> tuple[float, ...]:
    return tuple(getattr(parent, name) for name in _MULTIPLIERS)


def _shared_keys(parent: Any, target: type) -> dict[str, Any]:
    """What the parent's class and the target's have in common, special ids and rotary embedding among it."""
    ours = {f.name for f in fields(ExtKeys)}
    names = {f.name for f in fields(type(parent))} & {f.name for f in fields(target)}
    names -= ours | _DROPPED | {"architectures", "transformers_version", "model_type", "quantization_config"}
    values = {name: getattr(parent, name) for name in sorted(names)}
    if values.get("attention_dropout") is None:  # Llama's class takes it for none
        values["attention_dropout"] = 0.0
    return values
