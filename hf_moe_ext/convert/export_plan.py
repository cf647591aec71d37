"""What an export will do, and everything that can be refused before a weight is read."""

import copy
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext.convert.checkpoint import CheckpointReader
from hf_moe_ext.convert.conversion_plan import locate_checkpoint, read_config, refuse_other_tensors, refuse_quantised
from hf_moe_ext.convert.expert_layout import stock_tensors
from hf_moe_ext.convert.fold_plan import can_fold, refuse_adapter
from hf_moe_ext.convert.stock_form import STOCK, find_extras, make_stock_config
from hf_moe_ext.models.configuration import DERS, STANDARD, ExtKeys

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERTS = re.compile(_LAYER.pattern + r"mlp\.experts\..+")


@dataclass(frozen=True)
class ExportPlan:
    """An export that can be carried out.

    Attributes:
        source: folder of the source checkpoint.
        config: its configuration.
        target: configuration of the result.
        family: "mixtral", "olmoe" or "qwen3_moe".
        layers: those with a shared base.
        kept: what the source has beside that and a stock model has not, as ``key=value``; empty: the result is a stock one.
        can_fold: whether ``fold`` makes a stock model of the result.
    """

    source: Path
    config: Any
    target: Any
    family: str
    layers: tuple[int, ...]
    kept: tuple[str, ...]
    can_fold: bool

    @property
    def is_stock(self) -> bool:
        """Whether the result opens without this package."""
        return not self.kept

    def layer_of(self, name: str) -> int | None:
        """Layer whose shared-base experts a tensor belongs to; None for all others."""
        found = _EXPERTS.fullmatch(name)
        return int(found[1]) if found and int(found[1]) in self.layers else None

    def check_tensors(self, reader: CheckpointReader) -> None:
        """Refuse a checkpoint that does not hold the tensors of its model, and no others.

        Raises:
            ValueError: a missing, additional or mis-shaped tensor, by name.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config))
            expected = self._shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
            found = self._shapes({name: reader.shape(name) for name in reader.names})
        is_tied = self.config.tie_word_embeddings
        refuse_other_tensors(reader.folder, found, expected, is_tied, "the model of its config.json")

    def _shapes(self, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The same with ordinary experts one by one, as files may hold them or not; on the meta device."""
        shapes: dict[str, tuple[int, ...]] = {}
        standard = {i for i, block in enumerate(self.config.moe_blocks) if block == STANDARD}
        for name, shape in tensors.items():
            layer = _LAYER.match(name)
            if layer and int(layer[1]) in standard:
                parts = stock_tensors(name, torch.empty(shape), self.family)
                shapes |= {part: tuple(tensor.shape) for part, tensor in parts}
            else:
                shapes[name.replace(".block_sparse_moe.", ".mlp.", 1)] = shape
        return shapes


def plan_export(model: str | os.PathLike[str]) -> ExportPlan:
    """Check a request against the source's configuration.

    Raises:
        ValueError: naming the rule, the value and the next step.
    """
    refuse_adapter(Path(model), "export")
    source = locate_checkpoint(model)
    config = read_config(model, source)
    family = config.model_type.removesuffix("_ext")
    if family not in STOCK:
        known = ", ".join(f"{name}_ext" for name in STOCK)
        raise ValueError(f"export takes {known}; {model} has model_type {config.model_type!r}")
    layers = tuple(i for i, block in enumerate(getattr(config, "moe_blocks", ())) if block == DERS)
    if not layers:
        raise ValueError(f"{model} has no layer with moe_block='ders': its experts are ordinary ones already")
    refuse_quantised(model, config, "export")
    _refuse_parts(model, config)
    target = _without_shared_base(config)
    parts, multipliers = find_extras(target, family)
    kept = (*parts, *multipliers)
    result = target if kept else make_stock_config(target, family)
    return ExportPlan(
        source, config, result, family, layers, kept, can_fold(family) and not parts and bool(multipliers)
    )


def _refuse_parts(model: Any, config: Any) -> None:
    """Parts of shared-base blocks that blocks of ordinary experts have not."""
    parts = {
        "ders_bias": (config.ders_bias, "biases"),
        "moe_shared_expert_intermediate_size": (
            config.moe_shared_expert_intermediate_size,
            "an expert that serves every token",
        ),
    }
    for key, (value, what) in parts.items():
        if value:
            raise ValueError(
                f"{model} has {key}={value!r}: {what}, which blocks of ordinary experts have no place for. Serve it as it "
                "is, with hf_moe_ext imported"
            )


def _without_shared_base(config: Any) -> Any:
    """The same configuration with ordinary experts."""
    blocks = config.moe_block
    blocks = STANDARD if isinstance(blocks, str) else [STANDARD if block == DERS else block for block in blocks]
    if set(blocks) == {STANDARD}:
        blocks = STANDARD
    unset = {f.name: f.default for f in fields(ExtKeys) if f.name.startswith("ders_")}
    settings = config.to_dict() | unset | {"moe_block": blocks}
    settings.pop("model_type")
    return type(config).from_dict(settings)
