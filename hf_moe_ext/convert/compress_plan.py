"""What a compression will do, and everything that can be refused before a weight is read."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext.convert.conversion_plan import locate_checkpoint, read_config, refuse_quantised
from hf_moe_ext.convert.delta_encoding import MAGNITUDE_DROP, Encoding
from hf_moe_ext.convert.expert_matrices import MATRICES, ExpertMatrices, parent_name
from hf_moe_ext.convert.fold_plan import can_fold
from hf_moe_ext.convert.stock_form import STOCK, find_extras, list_blocks, make_stock_config
from hf_moe_ext.convert.streaming_reader import StreamingReader
from hf_moe_ext.models import configuration
from hf_moe_ext.models.configuration import ExtKeys

BASES = ("parent", "mean", "least_squares")
# Configuration of each family's result, and the dense types whose FFN and attention it has.
_TARGETS = {"mixtral": "MixtralExtConfig", "olmoe": "OlmoeExtConfig", "qwen3_moe": "Qwen3MoeExtConfig"}
_PARENTS = {"mixtral": ("llama", "mistral"), "olmoe": ("olmo", "olmo2", "llama"), "qwen3_moe": ("qwen3",)}


@dataclass(frozen=True)
class CompressPlan:
    """A compression that can be carried out.

    Attributes:
        source: folder of the MoE.
        config: its configuration.
        family: "mixtral", "olmoe" or "qwen3_moe".
        reader: of the MoE.
        experts: its matrices.
        parent: reader of the dense parent; None without.
    """

    source: Path
    config: Any
    family: str
    reader: StreamingReader
    experts: ExpertMatrices
    parent: StreamingReader | None

    @property
    def is_ext(self) -> bool:
        """Whether the source has the names of our families on disk."""
        return bool(self.config.model_type.endswith("_ext"))

    def count_bytes(self, layer: int, matrix: str, encoding: Encoding) -> tuple[int, int]:
        """Bytes of one matrix of all experts of a layer: as it is, and as base and deltas."""
        rows, cols = self.experts.shapes[matrix]
        dtype, num_experts = self.experts.dtype(layer), self.experts.num_experts
        one = rows * cols * dtype.itemsize
        return num_experts * one, one + num_experts * encoding.count_bytes((rows, cols), dtype)


def plan_compression(model: str | os.PathLike[str], parent: str | os.PathLike[str] | None, base: str) -> CompressPlan:
    """Check a request against the configurations and the tensors' shapes.

    Raises:
        ValueError: naming the argument, the rule, the value and the next step.
        FileNotFoundError: no safetensors weights, or a missing shard.
    """
    _check_base(parent, base)
    source = locate_checkpoint(model)
    config = read_config(model, source)
    family = config.model_type.removesuffix("_ext")
    if family not in STOCK:
        known = ", ".join(f"{name}, {name}_ext" for name in STOCK)
        raise ValueError(f"compress takes {known}; {model} has model_type {config.model_type!r}")
    refuse_quantised(model, config, "compress")
    layers = _standard_layers(model, config)
    reader = StreamingReader(source)
    _check_names(reader, config)
    experts = ExpertMatrices(reader, config.num_experts, expert_width(config), config.hidden_size, layers)
    if config.num_experts < 2:
        raise ValueError(f"{model} has {config.num_experts} expert a layer: there is nothing to share a base with")
    found = None if parent is None else _check_parent(parent, config, family, experts)
    return CompressPlan(source, config, family, reader, experts, found)


def expert_width(config: Any) -> int:
    """Inner width of an expert."""
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def target_config(plan: CompressPlan, chosen: Mapping[tuple[int, str], Encoding], seed: int) -> Any:
    """Configuration of the result: the family's ``*_ext`` with "ders" in every compressed layer.

    Args:
        plan: what is compressed.
        chosen: (layer, matrix) -> how its deltas are encoded; all of one method.
        seed: of sparse deltas' positions.
    """
    target = getattr(configuration, _TARGETS[plan.family])
    first = next(iter(chosen.values()))
    num_layers = plan.config.num_hidden_layers
    blocks = ["ders" if layer in plan.experts.layers else block for layer, block in enumerate(list_blocks(plan.config))]
    keys: dict[str, Any] = {
        "moe_block": "ders" if set(blocks) == {"ders"} else blocks,
        "ders_delta": first.form,
    }
    if first.bits is not None:
        keys["ders_group_size"] = first.group_size
    if first.form == "sparse":
        keys |= {"ders_seed": seed, "ders_stored_positions": first.method == MAGNITUDE_DROP}
    for key in ("rank", "drop_rate", "bits"):
        values = [
            {matrix: getattr(chosen[layer, matrix], key) for matrix in MATRICES} if (layer, "up") in chosen else None
            for layer in range(num_layers)
        ]
        keys[f"ders_{key}"] = _shorten(values)
    architecture = target.__name__.replace("Config", "ForCausalLM")
    # Keys of such experts that the source has without effect would have one now.
    unset = {f.name: f.default for f in fields(ExtKeys) if f.name.startswith("ders_")}
    unset["moe_shared_expert_intermediate_size"] = 0
    settings = plan.config.to_dict() | unset | keys | {"architectures": [architecture]}
    settings.pop("model_type")
    return target.from_dict(settings)


def stock_config(plan: CompressPlan) -> Any:
    """Configuration of the same model with ordinary experts, of the stock family.

    Raises:
        ValueError: blocks or multipliers that the stock family does not have.
    """
    what, scaled = find_extras(plan.config, plan.family) if plan.is_ext else ([], [])
    if what or scaled:
        raise ValueError(
            f"export='stock': the source has {(what + scaled)[0]}, which a stock {plan.family} model has not; leave export "
            "out" + ("" if what or not can_fold(plan.family) else ", or fold the multipliers first (hf-moe fold)")
        )
    return make_stock_config(plan.config, plan.family)


def _check_base(parent: Any, base: str) -> None:
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    if base == "parent" and parent is None:
        raise ValueError(
            "base='parent' needs parent, the dense model the experts were copied from; without it write base='mean' or "
            "base='least_squares' (--base)"
        )
    if base != "parent" and parent is not None:
        raise ValueError(f"base={base!r} does not use a parent, got parent={str(parent)!r}; leave one of the two out")


def _check_names(reader: StreamingReader, config: Any) -> None:
    """Refuse a checkpoint without a tensor that its model has; those of experts are counted elsewhere."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    found = {name.replace(".block_sparse_moe.", ".mlp.", 1) for name in reader.names}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(name for name in set(model.state_dict()) - found - tied if ".mlp.experts." not in name)
    if missing:
        raise ValueError(
            f"checkpoint {reader.folder} has no {missing[0]} ({len(missing)} tensors are missing); it is incomplete, or was "
            "saved without its language-model head: download or save it again"
        )


def _standard_layers(model: Any, config: Any) -> list[int]:
    blocks = list_blocks(config)
    if "ders" in blocks:
        raise ValueError(
            f"{model} has layers with moe_block='ders' already (layer {blocks.index('ders')}); compress the MoE it was made "
            "from, or write ordinary experts first (hf-moe export)"
        )
    layers = [layer for layer, block in enumerate(blocks) if block == "standard"]
    if not layers:
        raise ValueError(
            f"{model} has no standard MoE block, only {', '.join(sorted(set(blocks)))}; nothing to compress"
        )
    for key, owner in (("ders_bias", "dense"), ("moe_shared_expert_intermediate_size", "dcca")):
        if getattr(config, key, None) and owner in blocks:
            raise ValueError(
                f"{model} has {key}={getattr(config, key)!r} for its layers with moe_block={owner!r}; its standard experts have "
                "no such part, but with moe_block='ders' the key would ask for it in theirs too"
            )
    return layers


def _check_parent(parent: str | os.PathLike[str], config: Any, family: str, experts: ExpertMatrices) -> StreamingReader:
    folder = locate_checkpoint(parent)
    theirs = read_config(parent, folder)
    if theirs.model_type not in _PARENTS[family]:
        raise ValueError(
            f"parent {parent} has model_type {theirs.model_type!r}; experts of {config.model_type} come from "
            f"{' or '.join(_PARENTS[family])}. Give the dense model this MoE was made from, or base='mean'"
        )
    refuse_quantised(parent, theirs, "compress")
    wanted = {
        "hidden_size": config.hidden_size,
        "intermediate_size": expert_width(config),
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
    }
    for name, value in wanted.items():
        if getattr(theirs, name, None) != value:
            raise ValueError(
                f"parent {parent} has {name}={getattr(theirs, name, None)!r}, the MoE needs {value!r}; it is not the model "
                "these experts were copied from"
            )
    if getattr(theirs, "mlp_bias", False):
        raise ValueError(f"parent {parent} has mlp_bias=True, and experts of {config.model_type} have no biases")
    reader = StreamingReader(folder)
    for layer in experts.layers:
        for matrix, shape in experts.shapes.items():
            name = parent_name(layer, matrix)
            if name not in reader:
                raise ValueError(
                    f"parent {parent} has no {name}; it is incomplete, or no dense {theirs.model_type} model"
                )
            if reader.shape(name) != shape:
                raise ValueError(f"parent {parent}: {name} is {reader.shape(name)}, an expert's is {shape}")
    return reader


def _shorten(values: Sequence[dict[str, Any] | None]) -> Any:
    """A number where all matrices of all layers share it, a mapping where all layers do, else a list per layer."""
    given = [value for value in values if value is not None]
    if all(number is None for value in given for number in value.values()):
        return None
    if any(value != given[0] for value in given):
        return [None if value is None else _shorten_one(value) for value in values]
    return _shorten_one(given[0])


def _shorten_one(value: dict[str, Any]) -> Any:
    numbers = set(value.values())
    return numbers.pop() if len(numbers) == 1 else dict(value)
