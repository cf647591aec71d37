"""Keys of the blocks whose experts share a base: checks, and what is filled in where they were left open."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from transformers.utils import logging

from hf_moe_ext.host.families import expert_width, router_normalizes
from hf_moe_ext.ops.delta_metadata import LAYOUT
from hf_moe_ext.ops.delta_positions import ALGORITHM, VERSION, MaskStream, checksum, count_kept, exact_positions
from hf_moe_ext.ops.delta_quantization import BITS
from hf_moe_ext.scaling import ders_accounting

logger = logging.get_logger(__name__)

LOW_RANK, SPARSE, QUANTIZED = "low_rank", "sparse", "quantized"
COMPLEMENT, ADD = "complement", "add"
MATRICES = ("gate", "up", "down")
# Form -> key that it needs, with its default; keys that it may have beside.
_NEEDED: dict[str, tuple[str, float]] = {
    LOW_RANK: ("ders_rank", 4),
    SPARSE: ("ders_drop_rate", 0.9),
    QUANTIZED: ("ders_bits", 4),
}
_OPTIONAL = {SPARSE: ("ders_bits",)}
_NUMBERS = ("ders_rank", "ders_drop_rate", "ders_bits")
_SPARSE_ONLY = ("ders_seed", "ders_stored_positions", "ders_hold_positions")


def resolve_ders(config: Any, layers: list[int]) -> None:
    """Fill in what was left open, and refuse what cannot be built.

    Args:
        config: an ``*_ext`` configuration; changed.
        layers: those with shared-base experts.

    Raises:
        ValueError, TypeError: naming the key, the rule, the value and what to write.
    """
    _check_kinds(config)
    _check_choices(config)
    taken = [_NEEDED[config.ders_delta][0], *_OPTIONAL.get(config.ders_delta, ())]
    for name in _NUMBERS:
        if name not in taken and getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)!r} belongs to another form than ders_delta={config.ders_delta!r}; leave it "
                f"out (None), or write ders_delta={_owner(name)!r}"
            )
    needed, default = _NEEDED[config.ders_delta]
    if getattr(config, needed) is None:
        setattr(config, needed, default)
    for name in taken:
        _check_lists(config, name, layers)
    for layer in layers:
        for name in taken:
            _check_number(config, name, _of_layer(config, name, layer))
    _check_positions(config)
    _check_universal(config)
    _resolve_mask(config)
    _warn(config, layers)


def layer_numbers(config: Any, layer: int) -> dict[str, Any]:
    """``rank``, ``drop_rate`` and ``bits`` of one layer: a number or a mapping by matrix; None where the form has none."""
    return {name.removeprefix("ders_"): _of_layer(config, name, layer) for name in _NUMBERS}


def list_idle_keys(config: Any, keys: type, bias_used: bool) -> list[str]:
    """Of the shared-base experts' keys, those that were given although no layer has such experts."""
    spared = {"ders_mask"} | ({"ders_bias"} if bias_used else set())
    names = [f for f in fields(keys) if f.name.startswith("ders_") and f.name not in spared]
    return [f.name for f in names if getattr(config, f.name) != f.default]


@lru_cache
def describe_mask() -> tuple[tuple[str, Any], ...]:
    """Name and version of what regenerates positions, and the checksum of a small mask made with it."""
    shape = (25, 40)
    positions = exact_positions(MaskStream(seed=1, layer=2, matrix=1, expert=3), shape[0] * shape[1], 100)
    return (("algorithm", ALGORITHM), ("version", VERSION), ("checksum", checksum(positions, shape, LAYOUT)))


def _of_layer(config: Any, name: str, layer: int) -> Any:
    value = getattr(config, name)
    if isinstance(value, list):
        value = value[layer]
    needed, default = _NEEDED[config.ders_delta]
    return default if value is None and name == needed else value


def _owner(name: str) -> str:
    return next(form for form, (key, _) in _NEEDED.items() if key == name)


def _check_kinds(config: Any) -> None:
    for name in ("ders_stored_positions", "ders_bias", "ders_share_universal", "ders_hold_positions"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(config, name)!r}")
    for name, least in (("ders_group_size", 1), ("ders_seed", 0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not least <= value < 2**63:
            raise ValueError(f"{name} must be at least {least} and below 2**63, got {value}")


def _check_choices(config: Any) -> None:
    choices = {
        "ders_delta": tuple(_NEEDED),
        "ders_universal_gate": (COMPLEMENT, ADD),
        "ders_forward": ("fused", "materialised"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(config, name)!r}")


def _check_positions(config: Any) -> None:
    if config.ders_stored_positions and config.ders_hold_positions and config.ders_delta == SPARSE:
        raise ValueError(
            "ders_hold_positions=True keeps positions made from a seed, and with ders_stored_positions=True they are stored "
            "anyway; leave ders_hold_positions out"
        )


def _check_lists(config: Any, name: str, layers: list[int]) -> None:
    """A list has an entry per layer, and none where no layer reads it."""
    value = getattr(config, name)
    if not isinstance(value, list | tuple):
        return
    if len(value) != config.num_hidden_layers:
        raise ValueError(
            f"{name} lists {len(value)} entries for num_hidden_layers={config.num_hidden_layers}; write one per layer "
            "(None where moe_block is not 'ders'), or one for all"
        )
    setattr(config, name, list(value))  # what JSON gives back
    for layer, entry in enumerate(value):
        if entry is not None and layer not in layers:
            raise ValueError(
                f"{name}[{layer}]={entry!r}, but layer {layer} has moe_block={config.moe_blocks[layer]!r}; write None there"
            )


def _check_number(config: Any, name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        _check_one(config, name, name, value)
        return
    if set(value) != set(MATRICES):
        raise ValueError(f"{name} must be a number or have the keys 'gate', 'up' and 'down', got {dict(value)!r}")
    for matrix, number in value.items():
        _check_one(config, name, f"{name}[{matrix!r}]", number)


def _check_one(config: Any, name: str, shown: str, number: Any) -> None:
    kinds, noun = ((int, float), "a number") if name == "ders_drop_rate" else ((int,), "an integer")
    if isinstance(number, bool) or not isinstance(number, kinds):
        raise TypeError(f"{shown} must be {noun}, got {number!r}")
    hidden, width = config.hidden_size, expert_width(config)
    if name == "ders_rank" and not 1 <= number <= min(hidden, width):
        raise ValueError(
            f"{shown} must be from 1 to {min(hidden, width)}, the smaller of hidden_size={hidden} and the experts' width "
            f"{width}, got {number}"
        )
    if name == "ders_drop_rate":
        if not 0 < number < 1:
            raise ValueError(
                f"{shown} must lie strictly between 0 and 1, the share of entries that are zero, got {number}"
            )
        if count_kept(hidden * width, number) == 0:
            raise ValueError(
                f"{shown}={number} keeps none of a matrix's {hidden * width} entries; write a smaller rate"
            )
    if name == "ders_bits" and number not in BITS:
        raise ValueError(f"{shown} must be one of {', '.join(map(str, BITS))}, got {number}")


def _check_universal(config: Any) -> None:
    shared, width = config.moe_shared_expert_intermediate_size, expert_width(config)
    if config.ders_share_universal and shared != width:
        raise ValueError(
            f"ders_share_universal=True makes the shared expert one more delta on the experts' base, so "
            f"moe_shared_expert_intermediate_size={shared} must be their width; write "
            f"moe_shared_expert_intermediate_size={width}"
        )
    if shared and config.ders_universal_gate == COMPLEMENT and not router_normalizes(config):
        raise ValueError(
            "ders_universal_gate='complement' gives the shared expert 1 - s_1 and the routed ones s_1 times gates that sum "
            "to 1, but norm_topk_prob=False leaves their sum open; write norm_topk_prob=True, or ders_universal_gate='add'"
        )


def _resolve_mask(config: Any) -> None:
    """Positions hang on an algorithm; a file written with another one would be read as other weights."""
    if config.ders_delta != SPARSE:
        config.ders_mask = None
        return
    ours = dict(describe_mask())
    if config.ders_mask is not None and config.ders_mask != ours:
        raise ValueError(
            f"ders_mask={config.ders_mask!r}: the positions of these sparse deltas were made by another algorithm than this "
            f"release's {ours!r}; read the model with the release that wrote it (or, for a new model, leave ders_mask out)"
        )
    config.ders_mask = ours


def _warn(config: Any, layers: Iterable[int]) -> None:
    idle = []
    if config.ders_delta != SPARSE:
        idle += [name for name in _SPARSE_ONLY if getattr(config, name)]
    if config.ders_bits is None and config.ders_group_size != 128:
        idle.append("ders_group_size")
    if not config.moe_shared_expert_intermediate_size and config.ders_universal_gate != COMPLEMENT:
        idle.append("ders_universal_gate")
    if idle:
        logger.warning(
            f"{', '.join(idle)}: no effect with ders_delta={config.ders_delta!r}, ders_bits={config.ders_bits!r} and "
            f"moe_shared_expert_intermediate_size={config.moe_shared_expert_intermediate_size}; leave out"
        )
    complement = config.moe_shared_expert_intermediate_size and config.ders_universal_gate == COMPLEMENT
    if config.num_experts_per_tok == 1 and router_normalizes(config) and not complement:
        logger.warning(
            "num_experts_per_tok=1 with gates that are made to sum to 1: every gate is 1 whatever the router says, so the "
            "task's loss never trains the router; write norm_topk_prob=False or num_experts_per_tok=2, or train it by "
            "output_router_logits=True alone"
        )
    for sentence in dict.fromkeys(_explain_waste(config, layer) for layer in layers):
        if sentence:
            logger.warning(sentence)


def _explain_waste(config: Any, layer: int) -> str | None:
    """One sentence where base and deltas of a layer are no smaller than as many dense experts, in 16 bits an entry."""
    members = config.num_local_experts + config.ders_share_universal
    hidden, width, dense = config.hidden_size, expert_width(config), ders_accounting.DENSE_BITS
    numbers = {
        matrix: {
            name: value[matrix] if isinstance(value, Mapping) else value
            for name, value in layer_numbers(config, layer).items()
        }
        for matrix in MATRICES
    }
    stored = sum(dense + members * _bits_per_entry(config, each) for each in numbers.values())
    if stored < len(MATRICES) * members * dense:
        return None
    name, _ = _NEEDED[config.ders_delta]
    if config.ders_delta == LOW_RANK:
        bound = f"below {ders_accounting.break_even_rank(members, hidden, width):.4g}"
    elif config.ders_delta == QUANTIZED:
        bound = f"below {ders_accounting.break_even_bits(members):.4g}"
    else:
        kept = max(_bits_per_entry(config, each | {"drop_rate": 0.0}) for each in numbers.values())
        bound = f"above {1 - (members - 1) / members * dense / kept:.4g}"
    ratio = stored / (len(MATRICES) * members * dense)
    return (
        f"{name}={_of_layer(config, name, layer)!r} saves nothing: a base and {members} deltas take {ratio:.3g} times the "
        f"bytes of {members} dense experts; they take less with {name} {bound}"
    )


def _bits_per_entry(config: Any, numbers: Mapping[str, Any]) -> float:
    """Stored bits of one expert's delta, per entry of the matrix; 16 bits a trained entry."""
    hidden, width, dense = config.hidden_size, expert_width(config), ders_accounting.DENSE_BITS
    if config.ders_delta == LOW_RANK:
        return dense * numbers["rank"] * (hidden + width) / (hidden * width)
    bits = numbers["bits"]
    value = dense if bits is None else ders_accounting.quantized_bits_per_entry(bits, group_size=config.ders_group_size)
    if config.ders_delta == QUANTIZED:
        return value
    index = 8 * ders_accounting.INDEX_BYTES["int32" if config.ders_stored_positions else "seed"]
    return (1 - numbers["drop_rate"]) * (value + index)
