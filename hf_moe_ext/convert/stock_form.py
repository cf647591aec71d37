"""What a stock family can express of a model of ours: its configuration, and what it has no place for."""

import math
from dataclasses import fields
from typing import Any

import torch
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from hf_moe_ext.models.configuration import DENSE, STANDARD, ExtKeys, stock_dense_layers
from hf_moe_ext.mup.settings import read_head_dim

# Family -> its stock configuration.
STOCK: dict[str, type] = {"mixtral": MixtralConfig, "olmoe": OlmoeConfig, "qwen3_moe": Qwen3MoeConfig}


def make_stock_config(config: Any, family: str) -> Any:
    """The stock configuration of the same sizes; multipliers and blocks of ours are left behind, whatever they are."""
    stock = STOCK[family]
    ours = {"model_type", *(f.name for f in fields(ExtKeys))}
    settings = {name: value for name, value in config.to_dict().items() if name not in ours}
    if "norm_topk_prob" not in {f.name for f in fields(stock)}:
        settings.pop("norm_topk_prob", None)  # Mixtral's stock router has no choice
    settings["architectures"] = [stock.__name__.replace("Config", "ForCausalLM")]
    return stock.from_dict(settings)  # type: ignore[attr-defined]


def list_blocks(config: Any) -> list[str]:
    """Block of each layer, of a stock configuration too."""
    dense = stock_dense_layers(config)
    stock = [DENSE if layer in dense else STANDARD for layer in range(config.num_hidden_layers)]
    return list(getattr(config, "moe_blocks", stock))


def find_extras(config: Any, family: str) -> tuple[list[str], list[str]]:
    """What a stock model of the family has no place for.

    Args:
        config: an ``*_ext`` configuration.
        family: "mixtral", "olmoe" or "qwen3_moe".

    Returns:
        Blocks and gates as ``key=value``, and multipliers, which ``fold`` can put into weights.
    """
    plain = stock_dense_layers(config)
    others = [block for layer, block in enumerate(list_blocks(config)) if block != STANDARD and layer not in plain]
    factors = {
        "embedding_multiplier": config.embedding_multiplier,
        "attention_multiplier": read_attention_factor(config),
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling or 1.0,
        "router_logits_scaling": config.router_logits_scaling or 1.0,
    }
    what = [f"moe_block={others[0]!r}"] if others else []
    if family == "mixtral" and not config.norm_topk_prob:
        what.append("norm_topk_prob=False")
    if DENSE in list_blocks(config) and config.ders_bias:
        what.append("ders_bias=True")
    return what, [f"{name}={getattr(config, name)}" for name, factor in factors.items() if factor != 1]


def read_attention_factor(config: Any) -> float:
    """What the attention logits are multiplied by, over what a stock model multiplies them by.

    A power of two where it is one but for float64's last digit: attention kernels take both numbers in float32.
    """
    if config.attention_multiplier is None:
        return 1.0
    stock = read_head_dim(config) ** -0.5
    factor = float(config.attention_multiplier) / stock
    nearest = 2.0 ** round(math.log2(factor))
    wanted, found = torch.tensor([config.attention_multiplier, nearest * stock], dtype=torch.float32).tolist()
    return nearest if wanted == found else factor
