"""``PerftConfig``: what a PERFT adapter is, checked when it is built."""

import logging
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

import hf_moe_ext
from hf_moe_ext.cards import write_card
from hf_moe_ext.perft import adapter_files
from hf_moe_ext.perft.config_rules import (
    check_choices,
    check_experts,
    check_sizes,
    check_version,
    refuse_router,
    resolve_base_router,
    resolve_router,
)

logger = logging.getLogger(__name__)


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
        router_aux_loss_scope: R: the tokens over which both are taken: "sequence" (default; each sequence and layer by
            itself, so that gradients do not depend on how sequences are batched), "batch" (the micro-batch, all layers
            pooled, as the paper does), "global" (each layer's load in the whole previous step, over all processes; not
            in checkpoints, so the first step after a resume has none).
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
        check_choices(self)
        check_sizes(self)
        if self.variant == "R":
            resolve_router(self)
        else:
            refuse_router(self)
        resolve_base_router(self)
        check_experts(self)
        check_version(self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and the folder's card, in which a person's own words stay.

        Raises:
            ValueError: the weights beside it were written as a pickle.
        """
        adapter_files.refuse_pickle(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        # Without metrics: those that may lie there are of the weights that were just replaced.
        write_card(save_directory)

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
