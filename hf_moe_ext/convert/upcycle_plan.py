"""What an upcycling will do, and everything that can be refused before a weight is read."""

import copy
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe_ext.convert.checkpoint import CheckpointReader
from hf_moe_ext.convert.conversion_plan import locate_checkpoint, parse_layers, read_config, refuse_quantised
from hf_moe_ext.convert.dense_parents import (
    DERS,
    VANILLA,
    HomeRequest,
    list_dropped_keys,
    make_home,
    refuse_homeless,
    refuse_in_stock,
)
from hf_moe_ext.convert.fold_plan import refuse_adapter
from hf_moe_ext.ops.delta_metadata import check_rank
from hf_moe_ext.ops.delta_positions import MaskStream, check_drop_rate
from hf_moe_ext.ops.delta_quantization import BITS

UNIVERSALS = ("none", "keep", "extend")
DELTAS = {"low_rank": "rank", "sparse": "drop_rate", "quantized": "bits"}
DEFAULTS = {"rank": 4, "drop_rate": 0.9, "bits": 4}
# Types of weights one can calculate with, as safetensors names them.
STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of old checkpoints; the models compute it.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class UpcycleSettings:
    """The arguments of ``upcycle`` that say what the result is, as given."""

    form: str
    num_experts: int
    top_k: int
    layers: str | Sequence[int]
    delta: str
    rank: int
    drop_rate: float
    bits: int
    universal: str
    norm_topk_prob: bool
    router_std: float
    router_aux_loss_coef: float
    seed: int
    dtype: str | torch.dtype | None


@dataclass(frozen=True)
class UpcyclePlan:
    """An upcycling that can be carried out.

    Attributes:
        source: folder of the dense checkpoint.
        parent: its configuration.
        config: of the result.
        settings: as given, checked.
        layers: those that get experts, ascending.
        dtype: of the result's weights; None: each as it is stored.
        warnings: what the user should know before training.
    """

    source: Path
    parent: Any
    config: Any
    settings: UpcycleSettings
    layers: list[int]
    dtype: torch.dtype | None
    warnings: list[str]

    @property
    def keeps_function(self) -> bool:
        """Whether gates sum to 1, so that the result starts as its parent."""
        return self.settings.norm_topk_prob

    def outline_parent(self) -> nn.Module:
        """The dense model on the meta device."""
        return _outline(self.parent)

    def outline_result(self) -> nn.Module:
        """The result on the meta device."""
        return _outline(self.config)

    def check_names(self, reader: CheckpointReader) -> list[str]:
        """Names to read; refuses a checkpoint that does not hold the tensors of the dense model, and no others.

        Raises:
            ValueError: a missing, additional, mis-shaped or quantised tensor, by name.
        """
        model = self.outline_parent()
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = [name for name in reader.names if not _IGNORED.fullmatch(name)]
        optional = {"lm_head.weight"} if self.parent.tie_word_embeddings else set()
        missing, more = sorted(set(expected) - set(names) - optional), sorted(set(names) - set(expected))
        if missing:
            raise ValueError(
                f"checkpoint {reader.folder} has no {missing[0]} ({len(missing)} tensors are missing); it is incomplete, or "
                "was saved without its language-model head: download or save it again"
            )
        if more:
            raise ValueError(
                f"checkpoint {reader.folder} holds {more[0]}, which a {self.parent.model_type} model has no place for: it is "
                "quantised, or not what its config.json says; save the model by itself, with save_pretrained"
            )
        for name in names:
            if reader.shape(name) != expected[name]:
                raise ValueError(
                    f"{name} is {reader.shape(name)} in {reader.folder}, its config.json says {expected[name]}"
                )
            if reader.dtype(name) not in STORED_BYTES:
                raise ValueError(
                    f"checkpoint {reader.folder}: {name} is stored as {reader.dtype(name)}, so it is quantised; upcycle the "
                    "checkpoint in full precision it was made from, and quantise the result"
                )
        if self.parent.tie_word_embeddings and "lm_head.weight" in names:
            if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
                raise ValueError(
                    f"checkpoint {reader.folder}: tie_word_embeddings=True, but lm_head.weight is not the embedding; say "
                    "tie_word_embeddings=false in its config.json, or remove the one that is not used"
                )
            names.remove("lm_head.weight")
        return names


def plan_upcycle(model: str | os.PathLike[str], settings: UpcycleSettings) -> UpcyclePlan:
    """Check a request against the parent's configuration.

    Raises:
        ValueError, TypeError: naming the argument, the rule, the value and the next step.
    """
    _check_settings(settings)
    refuse_adapter(Path(model), "upcycle")
    source = locate_checkpoint(model)
    parent = read_config(model, source)
    refuse_quantised(model, parent, "upcycle")
    refuse_homeless(str(model), parent)
    layers = choose_layers(settings.layers, parent.num_hidden_layers)
    ders = _ders_keys(settings, parent) if settings.form == DERS else {}
    request = HomeRequest(
        *(settings.form, layers, settings.num_experts, settings.top_k, settings.norm_topk_prob),
        *(float(settings.router_aux_loss_coef), ders),
    )
    if settings.form == VANILLA:
        refuse_in_stock(str(model), parent, request, settings.universal)
    elif settings.delta == "low_rank":
        check_rank(settings.rank, parent.hidden_size, parent.intermediate_size)
    config = make_home(parent, request)
    warnings = _list_warnings(settings, parent)
    return UpcyclePlan(source, parent, config, settings, layers, read_dtype(settings.dtype), warnings)


def choose_layers(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Layers that get experts, ascending: "all", "every-other" (0, 2, 4, ...), numbers and ranges, or a list.

    Raises:
        ValueError, TypeError: none, repeated or outside the model; no integers.
    """
    if isinstance(layers, str):
        named = {"all": range(num_layers), "every-other": range(0, num_layers, 2)}
        chosen = list(named[layers]) if layers in named else parse_layers(layers)
    else:
        chosen = list(layers)
    if not chosen:
        raise ValueError(f"layers: none given; write 'all', 'every-other' or some of 0 to {num_layers - 1}")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in chosen):
        raise TypeError(f"layers must be integers, or text such as 'all', 'every-other' or '0-11,14'; got {layers!r}")
    outside = [layer for layer in chosen if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"layers must be from 0 to {num_layers - 1}; got {outside[0]}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers must not repeat; got {layers!r}")
    return sorted(chosen)


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A type of weights by name.

    Raises:
        ValueError: another than float64, float32, bfloat16 and float16.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in _DTYPES)
        raise ValueError(f"dtype must be one of {names}, or None for that of the checkpoint; got {dtype!r}")
    return found


def _outline(config: Any) -> nn.Module:
    with torch.device("meta"):
        # Of a copy: from_config notes the type in the configuration it is given.
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    return model


def _check_settings(s: UpcycleSettings) -> None:
    for name, value, allowed in (
        ("form", s.form, (DERS, VANILLA)),
        ("delta", s.delta, tuple(DELTAS)),
        ("universal", s.universal, UNIVERSALS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    for name, size in (("num_experts", s.num_experts), ("top_k", s.top_k), ("rank", s.rank)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an integer; got {size!r}")
    if s.num_experts < 2:
        raise ValueError(f"num_experts must be at least 2 (one expert is the dense model); got {s.num_experts}")
    if not 1 <= s.top_k <= s.num_experts:
        raise ValueError(f"top_k must be from 1 to num_experts={s.num_experts}; got {s.top_k}")
    if not isinstance(s.norm_topk_prob, bool):
        raise TypeError(f"norm_topk_prob must be True or False; got {s.norm_topk_prob!r}")
    for name, number in (("router_std", s.router_std), ("router_aux_loss_coef", s.router_aux_loss_coef)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a number; got {number!r}")
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite; got {number!r}")
    MaskStream(s.seed)  # raises for what is no seed
    check_drop_rate(s.drop_rate)
    if type(s.bits) is not int or s.bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {s.bits!r}")
    read_dtype(s.dtype)
    _check_gates(s)


def _check_gates(s: UpcycleSettings) -> None:
    if s.universal != "none" and not s.norm_topk_prob:
        raise ValueError(
            f"universal={s.universal!r} with norm_topk_prob=False: the universal expert has gate 1 - s and the routed ones "
            "share s, the largest router probability, so that all gates sum to 1; leave norm_topk_prob=True"
        )
    if _is_router_stuck(s) and s.router_aux_loss_coef == 0:
        raise ValueError(
            "top_k=1 with norm_topk_prob=True and router_aux_loss_coef=0: the one gate is always 1, so nothing would ever "
            "train the router; write norm_topk_prob=False, universal='extend' (gates 1 - s and s), top_k=2, or a "
            "router_aux_loss_coef above 0"
        )


def _is_router_stuck(s: UpcycleSettings) -> bool:
    return s.top_k == 1 and s.norm_topk_prob and s.universal == "none"


def _ders_keys(s: UpcycleSettings, parent: Any) -> dict[str, Any]:
    keys = {"ders_delta": s.delta, f"ders_{DELTAS[s.delta]}": getattr(s, DELTAS[s.delta]), "ders_seed": s.seed}
    if getattr(parent, "mlp_bias", False):
        keys["ders_bias"] = True
    if s.universal != "none":
        keys["moe_shared_expert_intermediate_size"] = parent.intermediate_size
        keys["ders_universal_gate"] = "complement"
    if s.universal == "extend":
        keys["ders_share_universal"] = True
    return keys


def _list_warnings(s: UpcycleSettings, parent: Any) -> list[str]:
    warnings = []
    idle = [f"{name}={getattr(s, name)}" for delta, name in DELTAS.items() if s.form == VANILLA or s.delta != delta]
    idle = [each for each in idle if each not in {f"{name}={value}" for name, value in DEFAULTS.items()}]
    if idle:
        kind = f"form={s.form!r}" if s.form == VANILLA else f"delta={s.delta!r}"
        warnings.append(f"{', '.join(idle)}: no effect with {kind}")
    if s.form == DERS and s.delta == "quantized":
        warnings.append(
            "delta='quantized': codes have no gradient, so training moves the base and the router only, and the experts stay "
            "equal; to train the experts write delta='low_rank' or 'sparse'"
        )
    if _is_router_stuck(s):
        warnings.append(
            "top_k=1 with norm_topk_prob=True: the one gate is always 1, so the task's loss never reaches the router, and "
            f"only the load-balance loss (router_aux_loss_coef={s.router_aux_loss_coef}) moves it; to train it write "
            "norm_topk_prob=False or universal='extend' (gates 1 - s and s)"
        )
    if not s.norm_topk_prob:
        warnings.append(
            "norm_topk_prob=False: gates are the kept probabilities as they are, so each layer starts as their sum times the "
            "dense FFN, and the result does not start as its parent"
        )
    dropped = list_dropped_keys(parent)
    if dropped:
        warnings.append(f"config.json: {parent.model_type} has no {', '.join(dropped)}; not kept")
    return warnings
