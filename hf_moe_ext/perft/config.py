"""``PerftConfig``: what a PERFT adapter is, checked when it is built."""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version
from peft.config import PeftConfig

import hf_moe_ext
from hf_moe_ext.perft import adapter_files

logger = logging.getLogger(__name__)

VARIANTS = ("R", "E", "D", "S")
ADAPTERS = ("lora", "parallel")
BASE_ROUTERS = ("frozen", "lora", "train")
SCOPES = ("batch", "sequence", "global")


class PerftType(str, Enum):  # noqa: UP042 - PEFT's status reads the name off str(), which StrEnum shortens
    """PEFT's own enumeration is closed to other packages; equal to its string, this one resolves in PEFT's tables."""

    PERFT = "PERFT"


@dataclass
class PerftConfig(PeftConfig):
    """Configuration of a PERFT adapter (arXiv 2411.08212): routed adapters beside the experts of an MoE model.

    Fields left at None take the variant's default; a field that means nothing for the variant is refused.

    Args:
        variant: "R" routes each token to ``top_k`` of ``num_experts`` adapters by a router of its own; "E" gives every
            base expert an adapter and reuses the base router; "D" adds ``num_experts`` adapters for every token; "S"
            adds one.
        adapter: "lora": ``alpha/r * B(A h)``; "parallel": ``W2 silu(W1 h)``, scale 1.
        r: bottleneck width of every adapter.
        lora_alpha: the LoRA scale is ``lora_alpha / r``.
        lora_dropout: dropout on the adapter's input (lora) or on its bottleneck (parallel).
        num_experts: number of adapters per layer (R and D; default 4).
        top_k: adapters per token (R; default 2, or 1 with one adapter).
        normalize_top_k: R: divide the chosen weights by their sum. None follows the base model's router (see
            ``hf_moe_ext.host.families``), but never at ``top_k=1``, where it would cut the router's gradient.
        expert_ids: E: the experts that get an adapter, for models of 128 experts and more: a list for every layer, or
            experts module -> list; see ``choose_experts_to_adapt``. None: all.
        shared_A: R, E, D: one A for all experts of a layer, a B for each (as HydraLoRA, arXiv 2404.19245, shares it): about
            half the parameters.
        router_aux_loss_coef: R: weight of the adapter router's load-balance loss (default 0.01).
        router_z_loss_coef: R: weight of its z-loss (default 0).
        router_aux_loss_scope: R: the tokens over which both are taken: "batch" (default; the micro-batch, all layers
            pooled, as the paper does), "sequence" (each sequence and layer by itself; gradients do not depend on how
            sequences are batched), "global" (each layer's load in the whole previous step, over all processes).
        base_router: what of the base model's own router trains with the adapter: "frozen" (default; the method),
            "lora" (a difference of rank r) or "train" (a whole one). The base's weight stays as it is.
        base_router_drift_coef: weight of the guard that holds a tuned base router near where it started: the divergence
            of its probabilities from the old ones, mean over tokens and layers (default 0.1).
        init_weights: True: Kaiming-uniform A per expert, B zero (the adapter starts as a no-op); False: B random too
            (for tests); "paper": the authors' A ~ N(0, sqrt(2/r)), B ~ N(0, 1e-6).
        target_modules: names (or a regular expression) of ``experts`` modules; None: every MoE block.
        exclude_modules: names (or a regular expression) of ``experts`` modules to leave out.
        layers_to_transform: layer indices to adapt; None: all.
        layers_pattern: name of the layer list, where it is not a common one.
        rank_pattern: module name or regular expression -> r.
        alpha_pattern: module name or regular expression -> lora_alpha.
        bias: "none", or "all" to train (and save) every bias of the base model.
        modules_to_save: further modules to train whole and save with the adapter.
        trainable_token_indices: token ids whose embeddings are trained and saved.
        hf_moe_ext_version: version that wrote the file; filled in.

    Raises:
        ValueError: for every combination that means nothing; the message says what to write instead.
    """

    variant: Literal["R", "E", "D", "S"] = "R"
    adapter: Literal["lora", "parallel"] = "lora"
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    num_experts: int | None = None
    top_k: int | None = None
    normalize_top_k: bool | None = None
    expert_ids: list[int] | dict[str, list[int]] | None = None
    shared_A: bool = False
    router_aux_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    router_aux_loss_scope: Literal["batch", "sequence", "global"] | None = None
    base_router: Literal["frozen", "lora", "train"] = "frozen"
    base_router_drift_coef: float | None = None
    init_weights: bool | Literal["paper"] = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all"] = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    hf_moe_ext_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PerftType.PERFT
        self.from_file = self.hf_moe_ext_version is not None  # no field: only what was saved knows its writer
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as every PEFT config holds it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        _check_choices(self)
        _check_sizes(self)
        if self.variant == "R":
            _resolve_router(self)
        else:
            _refuse_router(self)
        _resolve_base_router(self)
        _check_experts(self)
        _check_version(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and put the loading snippet on top of the folder's README.md.

        Raises:
            ValueError: the weights beside it were written as a pickle.
        """
        adapter_files.refuse_pickle(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        adapter_files.write_loading_snippet(Path(save_directory), self.base_model_name_or_path, self.task_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of a saved adapter.

        Raises:
            ValueError: the folder holds a pickled adapter and no safetensors.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            adapter_files.refuse_pickle(folder)
        else:
            hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token") if kwargs.get(key)}
            adapter_files.refuse_pickle_on_hub(str(pretrained_model_name_or_path), subfolder, **hub)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Drop keys this version does not know, as PEFT does and in its words, but name the package to upgrade."""
        kwargs = super().check_kwargs(**kwargs)
        if kwargs.get("peft_type") != PerftType.PERFT:
            return kwargs  # another method's file, whose keys are its own, or no adapter's, which PEFT refuses
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored. adapter_config.json "
                f"was probably written by a newer hf_moe_ext than {hf_moe_ext.__version__}: pip install -U hf_moe_ext",
                stacklevel=4,
            )
        return {key: value for key, value in kwargs.items() if key in known}


def _check_choices(config: PerftConfig) -> None:
    choices = {"variant": VARIANTS, "adapter": ADAPTERS, "bias": ("none", "all"), "base_router": BASE_ROUTERS}
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ValueError(f"PerftConfig: {name} must be one of {', '.join(allowed)}; got {value!r}")
    if config.init_weights not in (True, False, "paper"):
        raise ValueError(f"PerftConfig: init_weights must be True, False or 'paper'; got {config.init_weights!r}")
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError("PerftConfig: layers_pattern names the list for layers_to_transform; set that too")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "PerftConfig: layers_to_transform works with target_modules as a list of names; "
            f"a regular expression ({config.target_modules!r}) can name the layers itself"
        )


def _check_number(name: str, value: Any, kind: type, rule: str, holds: Callable[[Any], bool]) -> None:
    """Refuse what is no finite number of that kind, or breaks the rule."""
    whole = kind is int and isinstance(value, int)
    real = kind is float and isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not (whole or real) or not holds(value):
        raise ValueError(f"PerftConfig: {name} must be {rule}; got {value!r}")


def _check_sizes(config: PerftConfig) -> None:
    for name, ranks in (("r", {"": config.r}), ("rank_pattern", config.rank_pattern)):
        for pattern, rank in ranks.items():
            label = f"{name}[{pattern!r}]" if pattern else name
            _check_number(label, rank, int, "a whole number of at least 1", lambda v: v >= 1)
    for name, alphas in (("lora_alpha", {"": config.lora_alpha}), ("alpha_pattern", config.alpha_pattern)):
        for pattern, alpha in alphas.items():
            label = f"{name}[{pattern!r}]" if pattern else name
            _check_number(label, alpha, float, "positive", lambda v: v > 0)
    _check_number("lora_dropout", config.lora_dropout, float, "a probability in [0, 1)", lambda v: 0 <= v < 1)
    if config.normalize_top_k not in (None, True, False):
        raise ValueError(f"PerftConfig: normalize_top_k must be None, True or False; got {config.normalize_top_k!r}")
    if config.adapter == "parallel" and (config.lora_alpha != 32 or config.alpha_pattern):
        warnings.warn("PerftConfig: lora_alpha has no effect on adapter='parallel', whose scale is 1", stacklevel=4)


def _resolve_num_experts(config: PerftConfig) -> int:
    num_experts = 4 if config.num_experts is None else config.num_experts
    _check_number("num_experts", num_experts, int, "a whole number of at least 1", lambda v: v >= 1)
    return num_experts


def _resolve_router(config: PerftConfig) -> None:
    config.num_experts = _resolve_num_experts(config)
    config.top_k = min(2, config.num_experts) if config.top_k is None else config.top_k
    _check_number("top_k", config.top_k, int, "a whole number of at least 1", lambda v: v >= 1)
    if config.top_k > config.num_experts:
        raise ValueError(
            f"PerftConfig: top_k must be between 1 and num_experts={config.num_experts}; got {config.top_k}. "
            "Lower top_k or raise num_experts"
        )
    if config.normalize_top_k and config.top_k == 1:
        raise ValueError(
            "PerftConfig: normalize_top_k=True with top_k=1 makes every weight 1, so the router never learns from the "
            "model's loss; leave it out (None) or write False"
        )
    for name, default in (("router_aux_loss_coef", 0.01), ("router_z_loss_coef", 0.0)):
        value = getattr(config, name)
        value = default if value is None else value
        _check_number(name, value, float, "a number of at least 0", lambda v: v >= 0)
        setattr(config, name, value)
    if config.router_aux_loss_scope is None:
        config.router_aux_loss_scope = "batch"
    if config.router_aux_loss_scope not in SCOPES:
        raise ValueError(
            f"PerftConfig: router_aux_loss_scope must be one of {', '.join(SCOPES)}; got {config.router_aux_loss_scope!r}"
        )
    if config.num_experts == 1:
        warnings.warn(
            "PerftConfig: variant='R' with num_experts=1 gives the one adapter weight 1, so its router learns nothing; "
            "it equals variant='S', which saves the router",
            stacklevel=4,
        )


def _resolve_base_router(config: PerftConfig) -> None:
    if config.base_router == "frozen":
        if config.base_router_drift_coef is not None:
            raise ValueError(
                f"PerftConfig: base_router_drift_coef={config.base_router_drift_coef!r} holds back a base router that "
                "trains; leave it out, or choose base_router='lora' or 'train'"
            )
        return
    if config.base_router_drift_coef is None:
        config.base_router_drift_coef = 0.1
    _check_number(
        "base_router_drift_coef", config.base_router_drift_coef, float, "a number of at least 0", lambda v: v >= 0
    )


def _check_experts(config: PerftConfig) -> None:
    if config.shared_A not in (True, False):
        raise ValueError(f"PerftConfig: shared_A must be True or False; got {config.shared_A!r}")
    if config.shared_A and (config.variant == "S" or config.num_experts == 1):
        raise ValueError("PerftConfig: shared_A=True needs several adapters per layer to share it; leave it out")
    if config.expert_ids is None:
        return
    if config.variant != "E":
        raise ValueError(
            f"PerftConfig: expert_ids chooses among the base model's experts; variant={config.variant!r} has adapters of "
            "its own. Leave it out, or choose variant='E'"
        )
    lists = config.expert_ids.values() if isinstance(config.expert_ids, dict) else [config.expert_ids]
    for ids in lists:
        whole = isinstance(ids, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or not ids or len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(
                f"PerftConfig: expert_ids must be lists of different whole numbers of at least 0, none empty; got {ids!r}"
            )


def _refuse_router(config: PerftConfig) -> None:
    variant = config.variant
    for name in ("top_k", "normalize_top_k", "router_aux_loss_coef", "router_z_loss_coef", "router_aux_loss_scope"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"PerftConfig: {name} belongs to the router of variant='R'; variant={variant!r} has none. "
                f"Leave {name} out, or choose variant='R'"
            )
    if variant == "D":
        config.num_experts = _resolve_num_experts(config)
    elif config.num_experts is not None:
        instead = "has one adapter per base expert" if variant == "E" else "has a single adapter; for several use 'D'"
        raise ValueError(
            f"PerftConfig: num_experts={config.num_experts} means nothing here: variant={variant!r} {instead}"
        )


def _check_version(config: PerftConfig) -> None:
    ours = Version(hf_moe_ext.__version__)
    if config.hf_moe_ext_version is None:
        config.hf_moe_ext_version = hf_moe_ext.__version__
    elif Version(config.hf_moe_ext_version).release[:2] > ours.release[:2]:
        warnings.warn(
            f"this PERFT adapter was written by hf_moe_ext {config.hf_moe_ext_version}, newer than the installed {ours}; "
            "upgrade hf_moe_ext if it does not load",
            stacklevel=4,
        )
