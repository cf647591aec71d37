"""Reads a ``MoeShape`` out of a Transformers configuration, without Transformers.

Defaults of the families are in ``family_defaults``. Keys that do not change a count are not looked at.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_moe_ext.scaling.attention import Attention, GroupedAttention, LatentAttention
from hf_moe_ext.scaling.ext_config import read_ext_layers
from hf_moe_ext.scaling.family_defaults import DEFAULTS
from hf_moe_ext.scaling.family_keys import FamilyKeys
from hf_moe_ext.scaling.feed_forward import DenseFfn, FeedForward, MoeFfn
from hf_moe_ext.scaling.shape import MoeShape


def read_shape(source: Any) -> MoeShape:
    """See ``MoeShape.from_hf``."""
    values = load_config(source)
    family = values.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(
            f"the configuration has model_type {family!r}, which is not counted; known: {', '.join(sorted(DEFAULTS))}. "
            "Build a MoeShape by hand for another one"
        )
    keys = FamilyKeys(family, values, DEFAULTS[family])
    attention, layers = _FAMILIES[family](keys)
    return MoeShape(
        hidden_size=keys.count("hidden_size"),
        vocab_size=keys.count("vocab_size"),
        context_length=keys.count("max_position_embeddings"),
        attention=attention,
        layers=layers,
        tied_embeddings=keys.switch("tie_word_embeddings"),
        windows=_read_windows(keys),
        family=family,
    )


def load_config(source: Any) -> dict[str, Any]:
    """The keys of a configuration object, a mapping, a file, a folder or a Hub id (its config.json alone is fetched).

    Raises:
        TypeError: none of these.
        ValueError: the file is not a JSON object.
        OSError: there is no such file or id.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return dict(source.to_dict())
    if not isinstance(source, str | Path):
        raise TypeError(f"a configuration, its dictionary, a path or a Hub id is needed, got {source!r}")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        path = _fetch_config(str(source))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; pass a model's config.json") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; pass a model's config.json")
    return values


def _fetch_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{name!r} is neither a file nor a folder with a config.json, and as a Hub id it cannot be read: {reason}"
        ) from error


def _grouped(keys: FamilyKeys, **details: Any) -> GroupedAttention:
    num_heads = keys.count("num_attention_heads")
    head_dim = keys.optional_count("head_dim") if keys.knows("head_dim") else None
    if head_dim is None:
        head_dim = keys.count("hidden_size") // num_heads
    key_value_heads = keys.optional_count("num_key_value_heads") or num_heads
    return GroupedAttention(num_heads, key_value_heads, head_dim, **details)


def _latent(keys: FamilyKeys) -> LatentAttention:
    return LatentAttention(
        num_heads=keys.count("num_attention_heads"),
        key_value_rank=keys.count("kv_lora_rank"),
        query_rank=keys.optional_count("q_lora_rank"),
        nope_head_dim=keys.count("qk_nope_head_dim"),
        rope_head_dim=keys.count("qk_rope_head_dim"),
        value_head_dim=keys.count("v_head_dim"),
        bias=keys.switch("attention_bias"),
    )


Parts = tuple[Attention, tuple[FeedForward, ...]]


def _stock_experts(keys: FamilyKeys) -> MoeFfn:
    """Families whose ``intermediate_size`` is an expert's; attribute maps give ``num_experts`` two names."""
    return MoeFfn(
        keys.count("num_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        keys.count("intermediate_size"),
    )


def _mixtral(keys: FamilyKeys) -> Parts:
    return _grouped(keys), (_stock_experts(keys),) * keys.count("num_hidden_layers")


def _olmoe_attention(keys: FamilyKeys) -> GroupedAttention:
    bias = keys.switch("attention_bias")
    return _grouped(keys, qkv_bias=bias, output_bias=bias, query_key_norm="full")


def _olmoe(keys: FamilyKeys) -> Parts:
    return _olmoe_attention(keys), (_stock_experts(keys),) * keys.count("num_hidden_layers")


def _granitemoe(keys: FamilyKeys) -> Parts:
    bias = keys.switch("attention_bias")
    layers = (_stock_experts(keys),) * keys.count("num_hidden_layers")
    return _grouped(keys, qkv_bias=bias, output_bias=bias), layers


def _gpt_oss(keys: FamilyKeys) -> Parts:
    bias = keys.switch("attention_bias")
    experts = MoeFfn(
        keys.count("num_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        keys.count("intermediate_size"),
        bias=True,
        router_bias=True,
    )
    attention = _grouped(keys, qkv_bias=bias, output_bias=bias, sinks=True)
    return attention, (experts,) * keys.count("num_hidden_layers")


def sparse_step_layers(keys: FamilyKeys, experts: FeedForward) -> tuple[FeedForward, ...]:
    """Qwen: a layer has experts unless it is listed or out of step, else a dense FFN of ``intermediate_size``."""
    listed, step = keys.value("mlp_only_layers") or [], keys.count("decoder_sparse_step")
    dense = DenseFfn(keys.count("intermediate_size"))
    return tuple(
        experts if index not in listed and (index + 1) % step == 0 else dense
        for index in range(keys.count("num_hidden_layers"))
    )


def _qwen2_moe(keys: FamilyKeys) -> Parts:
    experts = MoeFfn(
        keys.count("num_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        keys.count("moe_intermediate_size"),
        shared=DenseFfn(keys.count("shared_expert_intermediate_size")),
        shared_gate=True,
    )
    return _grouped(keys, qkv_bias=keys.switch("qkv_bias")), sparse_step_layers(keys, experts)


def _qwen3_attention(keys: FamilyKeys) -> GroupedAttention:
    bias = keys.switch("attention_bias")
    return _grouped(keys, qkv_bias=bias, output_bias=bias, query_key_norm="head")


def _qwen3_experts(keys: FamilyKeys) -> MoeFfn:
    return MoeFfn(
        keys.count("num_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        keys.count("moe_intermediate_size"),
    )


def _qwen3_moe(keys: FamilyKeys) -> Parts:
    return _qwen3_attention(keys), sparse_step_layers(keys, _qwen3_experts(keys))


def _dense_first(keys: FamilyKeys, bias: bool = False) -> tuple[FeedForward, ...]:
    """DeepSeek and GLM: the first layers are dense; shared experts are one FFN of their joint width."""
    width = keys.count("moe_intermediate_size")
    num_layers, first = keys.count("num_hidden_layers"), keys.number("first_k_dense_replace")
    experts = MoeFfn(
        keys.count("n_routed_experts", "num_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        width,
        shared=DenseFfn(width * keys.count("n_shared_experts"), bias=bias),
    )
    dense = DenseFfn(keys.count("intermediate_size"), bias=bias)
    return tuple(experts if index >= first else dense for index in range(num_layers))


def _deepseek_v2(keys: FamilyKeys) -> Parts:
    return _latent(keys), _dense_first(keys, bias=keys.switch("mlp_bias"))


def _deepseek_v3(keys: FamilyKeys) -> Parts:
    return _latent(keys), _dense_first(keys)


def _glm4_moe(keys: FamilyKeys) -> Parts:
    norm = "head" if keys.switch("use_qk_norm") else "none"
    return _grouped(keys, qkv_bias=keys.switch("attention_bias"), query_key_norm=norm), _dense_first(keys)


def _ext(attention: Callable[[FamilyKeys], Attention], stock: Callable[[FamilyKeys], MoeFfn]) -> Callable[..., Parts]:
    def read(keys: FamilyKeys) -> Parts:
        return attention(keys), read_ext_layers(keys, stock(keys))

    return read


_FAMILIES: dict[str, Callable[[FamilyKeys], Parts]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "granitemoe": _granitemoe,
    "mixtral_ext": _ext(_grouped, _stock_experts),
    "olmoe_ext": _ext(_olmoe_attention, _stock_experts),
    "qwen3_moe_ext": _ext(_qwen3_attention, _qwen3_experts),
}


def _read_windows(keys: FamilyKeys) -> tuple[int | None, ...]:
    """Window of each layer, where any has one."""
    if not keys.knows("sliding_window"):
        return ()
    window = keys.value("sliding_window") and keys.number("sliding_window")
    num_layers = keys.count("num_hidden_layers")
    if not window or (keys.knows("use_sliding_window") and not keys.switch("use_sliding_window")):
        return ()
    if not keys.knows("layer_types"):
        return (window,) * num_layers
    kinds = keys.value("layer_types")
    if kinds is None:  # every other layer, from the first; Qwen2 only below max_window_layers
        below = keys.number("max_window_layers") if keys.knows("max_window_layers") else num_layers
        kinds = ["sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(
            f"{keys.family} configuration: layer_types must have one entry per layer ({num_layers}), got {len(kinds)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
