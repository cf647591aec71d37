"""What a conversion to DCCA will do, and everything that can be refused before a weight is read."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_moe_ext.models.configuration import DCCA, STANDARD, MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.models.dcca_keys import ALIGNMENT, nearest_aligned
from hf_moe_ext.mup import config_file

_TARGETS: dict[str, type] = {
    "mixtral": MixtralExtConfig,
    "mixtral_ext": MixtralExtConfig,
    "olmoe": OlmoeExtConfig,
    "olmoe_ext": OlmoeExtConfig,
}
# What a checkpoint is made of; pickled weights stay on the Hub.
_WANTED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE")


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that can be carried out.

    Attributes:
        source: folder of the source checkpoint.
        config: of the result, an ``*_ext`` configuration.
        source_blocks: block of each layer in the source.
        layers: those to convert, ascending.
    """

    source: Path
    config: Any
    source_blocks: list[str]
    layers: list[int]

    def standard_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a standard block's tensors, by module name."""
        c = self.config
        experts, hidden, width = c.num_local_experts, c.hidden_size, c.intermediate_size
        return {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
            "mlp.experts.down_proj": (experts, hidden, width),
        }


def plan_conversion(
    model: str | os.PathLike[str],
    layers: Iterable[int] | None = None,
    latent_size: int | None = None,
    ratio: float | None = None,
    expert_gated: bool = True,
    expert_intermediate_size: int | None = None,
) -> ConversionPlan:
    """Check a request against the source's configuration.

    Raises:
        ValueError: naming the argument, the rule, the value and the next step.
    """
    source = locate_checkpoint(model)
    config = read_config(model, source)
    target = _TARGETS.get(config.model_type)
    if target is None:
        raise ValueError(f"to_dcca converts {', '.join(_TARGETS)}; {model} has model_type {config.model_type!r}")
    refuse_quantised(model, config, "to_dcca")
    blocks = list(getattr(config, "moe_blocks", ["standard"] * config.num_hidden_layers))
    chosen = _choose_layers(layers, blocks)
    _refuse_other_blocks(blocks, chosen)
    size = _choose_latent_size(config.hidden_size, latent_size, ratio)
    _check_experts(config, expert_gated, expert_intermediate_size)
    keys = {
        "moe_latent_size": size,
        "moe_expert_gated": True,
        "moe_expert_intermediate_size": config.intermediate_size,
        "moe_expert_act": config.hidden_act,
        "moe_latent_norm": False,
        "moe_shared_expert_intermediate_size": 0,
    }
    if DCCA in blocks:
        _check_present_blocks(config, keys)
    mixed = [DCCA if i in chosen or block == DCCA else block for i, block in enumerate(blocks)]
    keys["moe_block"] = DCCA if set(mixed) == {DCCA} else mixed
    settings = config.to_dict() | keys | {"architectures": [target.__name__.replace("Config", "ForCausalLM")]}
    settings.pop("model_type")
    return ConversionPlan(source, target.from_dict(settings), blocks, chosen)  # type: ignore[attr-defined]


def locate_checkpoint(model: str | os.PathLike[str]) -> Path:
    """Folder of a checkpoint; an id of the Hub is downloaded, or found in the cache, without pickled weights.

    Raises:
        ValueError: neither a folder with a config.json nor a model that can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{model} is a folder without config.json; give the folder of a checkpoint")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(_WANTED_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{model} is neither a folder here nor a model that the Hub or its cache gives: {error}"
        ) from error


def read_config(model: str | os.PathLike[str], source: Path) -> Any:
    """The configuration in a checkpoint's folder.

    Raises:
        ValueError: it cannot be read; ``model`` is what the user called it.
    """
    return config_file.read_config(source, model)


def refuse_quantised(model: str | os.PathLike[str], config: Any, conversion: str) -> None:
    """Refuse weights that are not numbers one can calculate with.

    Raises:
        ValueError: naming the method.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{conversion}: {model} is quantised ({config.quantization_config.get('quant_method', 'quantization_config')!r}); "
            "convert the checkpoint in full precision it was made from, and quantise the result"
        )


def refuse_other_tensors(
    folder: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    is_tied: bool,
    owner: str,
) -> None:
    """Refuse a checkpoint that does not hold the tensors of its model, and no others.

    Args:
        folder: of the checkpoint.
        found: shapes by name.
        expected: shapes by name.
        is_tied: whether the head may be absent, since it is the embedding.
        owner: whose place for a tensor there is none in, for the message: "a stock olmoe model".

    Raises:
        ValueError: a missing, additional or mis-shaped tensor, by name.
    """
    optional = {"lm_head.weight"} if is_tied else set()
    missing, more = sorted(set(expected) - set(found) - optional), sorted(set(found) - set(expected))
    if missing:
        raise ValueError(
            f"checkpoint {folder} has no {missing[0]} ({len(missing)} tensors are missing); it is incomplete, or was saved "
            "without its language-model head: download or save it again"
        )
    if more:
        raise ValueError(
            f"checkpoint {folder} holds {more[0]}, which {owner} has no place for; save the model by itself, with "
            "save_pretrained"
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(f"{name} is {shape} in {folder}, its config.json says {expected[name]}")


def parse_layers(text: str) -> list[int]:
    """Layers written as ``3,5-8``.

    Raises:
        ValueError: anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise ValueError(f"layers must be numbers and ranges such as 3,5-8; got {text!r}")
        layers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return layers


def _choose_layers(layers: Iterable[int] | None, blocks: list[str]) -> list[int]:
    free = [i for i, block in enumerate(blocks) if block != DCCA]
    chosen = free if layers is None else list(layers)
    if not chosen:
        raise ValueError(f"layers: nothing to convert; the model's {len(blocks)} layers are {blocks}")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in chosen):
        raise TypeError(f"layers must be integers; got {chosen!r}")
    outside = [layer for layer in chosen if not 0 <= layer < len(blocks)]
    if outside:
        raise ValueError(f"layers must be from 0 to {len(blocks) - 1}; got {outside[0]}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers must not repeat; got {chosen!r}")
    done = [layer for layer in chosen if layer not in free]
    if done:
        raise ValueError(f"layers: layer {done[0]} is a DCCA block already; choose among {free}")
    return sorted(chosen)


def _refuse_other_blocks(blocks: list[str], chosen: list[int]) -> None:
    """Only standard blocks become latent ones; others may stay beside them, but what reads a model here knows none."""
    other = [i for i, block in enumerate(blocks) if block not in (STANDARD, DCCA)]
    if other:
        raise ValueError(
            f"layer {other[0]} has moe_block={blocks[other[0]]!r}, which to_dcca does not read (layers to convert: {chosen}); "
            "write ordinary experts first (`hf-moe export` for moe_block='ders')"
        )


def _choose_latent_size(hidden_size: int, latent_size: int | None, ratio: float | None) -> int:
    if latent_size is not None and ratio is not None:
        raise ValueError(f"latent_size and ratio say the same; give one of latent_size={latent_size}, ratio={ratio}")
    if latent_size is None:
        share = 0.25 if ratio is None else ratio
        if not 0 < share <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1; got {ratio!r}")
        return min(nearest_aligned(share * hidden_size), hidden_size)
    if isinstance(latent_size, bool) or not isinstance(latent_size, int):
        raise TypeError(f"latent_size must be an integer; got {latent_size!r}")
    if not 1 <= latent_size <= hidden_size:
        raise ValueError(f"latent_size must be from 1 to hidden_size={hidden_size}; got {latent_size}")
    if latent_size % ALIGNMENT:
        raise ValueError(
            f"latent_size must be a multiple of {ALIGNMENT} (grouped_mm); got {latent_size}, write "
            f"{nearest_aligned(latent_size)}"
        )
    return latent_size


def _check_experts(config: Any, gated: bool, intermediate_size: int | None) -> None:
    if not gated:
        raise ValueError(
            "expert_gated=False: the source's experts are gated, act(G x) * (U x), and a product of two matrices' rows has "
            "no un-gated form act(U x); leave expert_gated=True"
        )
    if intermediate_size is not None and intermediate_size != config.intermediate_size:
        raise ValueError(
            f"expert_intermediate_size={intermediate_size}: each inner unit of a converted expert stands for one of the "
            f"source's, so it must be the source's intermediate_size={config.intermediate_size}; leave it out"
        )
    if config.intermediate_size % ALIGNMENT:
        raise ValueError(
            f"the source's intermediate_size={config.intermediate_size} is not a multiple of {ALIGNMENT}, which grouped_mm "
            "needs of the converted experts; such a model cannot be converted"
        )


def _check_present_blocks(config: Any, keys: dict[str, Any]) -> None:
    """DCCA blocks that the source has already share the keys of the new ones."""
    for name, value in keys.items():
        present = getattr(config, name)
        if present != value:
            advice = f"write latent_size={present}" if name == "moe_latent_size" else "such a model cannot be converted"
            raise ValueError(
                f"the source's DCCA layers have {name}={present!r} and the new ones would have {value!r}, but a model has "
                f"one value for all its layers; {advice}"
            )
