"""The layers of ``mixtral_ext``, ``olmoe_ext`` and ``qwen3_moe_ext``: standard, latent (DCCA), shared-base (DeRS), dense."""

from dataclasses import replace
from typing import Any

from hf_moe_ext.scaling.family_keys import FamilyKeys
from hf_moe_ext.scaling.feed_forward import Deltas, DenseFfn, FeedForward, MoeFfn

EXT_DEFAULTS: dict[str, Any] = {
    "moe_block": "standard",
    "moe_latent_size": None,
    "moe_expert_gated": False,
    "moe_expert_intermediate_size": None,
    "moe_latent_norm": False,
    "moe_shared_expert_intermediate_size": 0,
    "ders_delta": "low_rank",
    "ders_rank": None,
    "ders_drop_rate": None,
    "ders_bits": None,
    "ders_bias": False,
    "ders_share_universal": False,
}
_MATRICES = ("gate", "up", "down")
_USUAL = {"low_rank": 4, "sparse": 0.9, "quantized": 4}
_NUMBER = {"low_rank": "ders_rank", "sparse": "ders_drop_rate", "quantized": "ders_bits"}


def read_ext_layers(keys: FamilyKeys, stock: MoeFfn) -> tuple[FeedForward, ...]:
    """The block of each layer, as ``moe_block`` names them.

    Args:
        keys: of the configuration.
        stock: the family's own experts, which a "standard" layer has.
    """
    dense = _stock_dense_layers(keys)
    named = enumerate(read_blocks(keys))
    return tuple(_read_layer(keys, stock, "dense" if i in dense else block, i) for i, block in named)


def _stock_dense_layers(keys: FamilyKeys) -> set[int]:
    """Layers that Qwen3-MoE's own keys make dense, whatever ``moe_block`` says for all."""
    if not keys.knows("decoder_sparse_step"):
        return set()
    listed, step = keys.value("mlp_only_layers") or [], keys.count("decoder_sparse_step")
    return {i for i in range(keys.count("num_hidden_layers")) if i in listed or (i + 1) % step}


def read_blocks(keys: FamilyKeys) -> list[str]:
    """Name of each layer's block.

    Raises:
        ValueError: a list of the wrong length, or a name that is none.
    """
    value, num_layers = keys.value("moe_block"), keys.count("num_hidden_layers")
    blocks = [value] * num_layers if isinstance(value, str) else list(value)
    if len(blocks) != num_layers:
        raise ValueError(
            f"{keys.family} configuration: moe_block lists {len(blocks)} blocks for num_hidden_layers={num_layers}"
        )
    unknown = sorted({str(block) for block in blocks} - {"standard", "dcca", "ders", "dense"})
    if unknown:
        raise ValueError(
            f"{keys.family} configuration: moe_block must be standard, dcca, ders or dense, got {unknown[0]!r}"
        )
    return blocks


def _read_layer(keys: FamilyKeys, stock: MoeFfn, block: str, index: int) -> FeedForward:
    if block == "dense":
        return DenseFfn(keys.count("intermediate_size"), bias=keys.switch("ders_bias"))
    if block == "dcca":
        return _read_latent(keys, stock)
    return stock if block == "standard" else _read_ders(keys, stock, index)


def _read_latent(keys: FamilyKeys, stock: MoeFfn) -> MoeFfn:
    hidden_size, gated = keys.count("hidden_size"), keys.switch("moe_expert_gated")
    # Open values as the configuration class fills them in.
    latent_size = keys.optional_count("moe_latent_size") or hidden_size // 4
    width = keys.optional_count("moe_expert_intermediate_size")
    if width is None:
        equal = 3 * hidden_size * stock.intermediate_size / ((3 if gated else 2) * latent_size)
        width = max(8, round(equal / 8) * 8)
    return replace(
        stock,
        intermediate_size=width,
        gated=gated,
        latent_size=latent_size,
        latent_norm=keys.switch("moe_latent_norm"),
        shared=_read_shared(keys, gated),
    )


def _read_shared(keys: FamilyKeys, gated: bool, bias: bool = False) -> DenseFfn | None:
    width = keys.number("moe_shared_expert_intermediate_size")
    return DenseFfn(width, gated, bias) if width else None


def _read_ders(keys: FamilyKeys, stock: MoeFfn, index: int) -> MoeFfn:
    form, universal = keys.value("ders_delta"), keys.switch("ders_share_universal")
    bias = keys.switch("ders_bias")
    if form not in _NUMBER:
        raise ValueError(f"{keys.family} configuration: ders_delta must be low_rank, sparse or quantized, got {form!r}")
    given = {name: _per_matrix(keys.value(name), index) for name in ("ders_rank", "ders_drop_rate", "ders_bits")}
    numbers = given[_NUMBER[form]] or (_USUAL[form],) * 3
    deltas = Deltas(
        form,
        rank=tuple(int(n) for n in numbers) if form == "low_rank" else (),
        drop_rate=tuple(float(n) for n in numbers) if form == "sparse" else (),
        bits=tuple(int(n) for n in (numbers if form == "quantized" else given["ders_bits"]))
        if form != "low_rank"
        else (),
        share_universal=universal,
    )
    shared = None if universal else _read_shared(keys, gated=True, bias=bias)
    return replace(stock, bias=bias, deltas=deltas, shared=shared)


def _per_matrix(value: Any, index: int) -> tuple[float, ...]:
    """A number, one per matrix by name, or a list of those per layer, as one number for gate, up and down; () if none."""
    if isinstance(value, list | tuple):
        value = value[index]
    if value is None:
        return ()
    if isinstance(value, dict):
        return tuple(value[name] for name in _MATRICES)
    return (value,) * len(_MATRICES)
