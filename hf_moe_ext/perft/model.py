"""``PerftModel``: finds the blocks, checks everything before a module is touched, then wraps their experts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES, SEQ_CLS_HEAD_NAMES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hf_moe_ext.host.blocks import ExpertsSite, explain_no_blocks, find_router, iterate_experts, read_experts
from hf_moe_ext.host.families import FAMILIES, normalizes_top_k
from hf_moe_ext.host.quantization import is_quantised
from hf_moe_ext.perft.adapter_files import KEY_PREFIX
from hf_moe_ext.perft.base_router import BaseRouterLayer
from hf_moe_ext.perft.config import PerftConfig
from hf_moe_ext.perft.gradient_sync import broadcast, check_attachable, is_distributed
from hf_moe_ext.perft.layer import AdapterSettings, PerftLayer, resolve_settings
from hf_moe_ext.perft.report import describe_trainable, warn_unquantised
from hf_moe_ext.perft.state import PerftState, describe_key_mismatch
from hf_moe_ext.perft.tuner_layer import MERGE_REFUSAL, PerftTunerLayer

logger = logging.getLogger(__name__)

_MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what PEFT's wrappers can mix


class PerftModel(BaseTuner):
    """The PEFT tuner of PERFT; made by ``get_peft_model(model, PerftConfig(...))``.

    Attaching is all or nothing: what cannot be served is refused before the model is changed.
    """

    prefix: str = "perft_"
    tuner_layer_cls = (PerftLayer, BaseRouterLayer)  # type: ignore[assignment]  # PEFT only asks isinstance of it
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - BaseTuner's name; blocks are found by structure

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach one adapter; see ``BaseTuner.inject_adapter``.

        Raises:
            ValueError: no MoE block, a target that is no experts module, or a base router whose rule is unknown.
        """
        config: Any = self.peft_config[adapter_name]
        if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name):
            raise ValueError(f"adapter_name {adapter_name!r} cannot name a parameter; use letters, digits, _ or -")
        check_attachable(model, config)
        if getattr(config, "target_modules", None) != DUMMY_TARGET_MODULES:
            self._resolve_targets(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            state = find_state(model)
            if state is not None:
                state.detach(adapter_name)
            raise
        state = find_state(model)
        if state is not None and config.from_file:
            state.fresh.add(adapter_name)
        if is_distributed(model):
            broadcast(
                [p for name, p in model.named_parameters() if ".perft_" in name and name.endswith(f".{adapter_name}")]
            )
        logger.info("PERFT adapter %r attached.\n%s", adapter_name, describe_trainable(model, adapter_name))
        warn_unquantised(model)

    def _resolve_targets(self, model: nn.Module, config: PerftConfig) -> None:
        """Fill ``target_modules`` and refuse what cannot be served, before anything is changed."""
        sites = {site.name: site for site in iterate_experts(model)}
        if not sites:
            raise NoMatchingPeftModuleError(
                f"{explain_no_blocks(model)}; supported: every family whose experts take (hidden_states, index, weights), "
                f"such as mixtral, olmoe, qwen3_moe, deepseek_v3, glm4_moe, gpt_oss and {len(FAMILIES) - 6} more"
            )
        names = [name for name, _ in model.named_modules()]
        if config.target_modules is None:
            config.target_modules = _shortest_names(list(sites), names)  # type: ignore[assignment]
        inside = tuple(f"{name}." for name in sites)
        matched = [n for n in names if not n.startswith(inside) and self._check_target_module_exists(config, n)]
        foreign = [name for name in matched if name not in sites]
        if foreign:
            kind = type(model.get_submodule(foreign[0])).__name__
            raise ValueError(
                f"PerftConfig: target_modules matches {foreign[0]!r} ({kind}), which is not the experts module of a MoE "
                f"block; leave target_modules out to adapt every block, or name some of: {', '.join(sites)}"
            )
        if not matched:
            raise NoMatchingPeftModuleError(
                f"PerftConfig: no experts module is left by target_modules={config.target_modules!r}, "
                f"exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}, "
                f"layers_pattern={config.layers_pattern!r}; this model has: {', '.join(sites)}"
            )
        # PEFT itself adds both names of a classification head, of which a model has one.
        wanted = [m for m in config.modules_to_save or () if m not in SEQ_CLS_HEAD_NAMES]
        lost = [m for m in wanted if not any(name == m or name.endswith(f".{m}") for name in names)]
        if lost:
            raise ValueError(
                f"PerftConfig: modules_to_save names {', '.join(lost)}, which this model does not have; leave it out, or "
                "give a module's name as in model.named_modules()"
            )
        if isinstance(config.expert_ids, dict) and (unknown := sorted(set(config.expert_ids) - set(matched))):
            raise ValueError(
                f"PerftConfig: expert_ids has an entry for {unknown[0]!r}, which is not adapted; this model adapts: "
                f"{', '.join(matched)}"
            )
        for name in matched:
            self._settings(config, name, sites[name], model)  # raises here rather than half-way
            if config.base_router != "frozen":
                _check_base_router(config, model, sites[name])

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    @staticmethod
    def _settings(config: PerftConfig, name: str, site: ExpertsSite, model: nn.Module) -> AdapterSettings:
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        normalize: bool | None = False
        if config.variant == "R" and config.top_k != 1:
            normalize = config.normalize_top_k
            if normalize is None:
                normalize = normalizes_top_k(site.experts, getattr(model, "config", None))
        expert_ids = _expert_ids(config, name, site.num_experts)
        return resolve_settings(config, rank, alpha, site.num_experts, bool(normalize), expert_ids)

    def _create_and_replace(  # type: ignore[override]  # PEFT's own tuners narrow the configuration too
        self,
        peft_config: PerftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        site = read_experts(current_key, target)
        if site is None:
            raise ValueError(f"{current_key!r} ({type(target).__name__}) is not the experts module of a MoE block")
        if isinstance(target, PerftLayer):
            layer = target
            # Expert parallelism has rewritten the experts' own count to the local one by now.
            site = replace(site, num_experts=layer.base_num_experts)
        else:
            state = find_state(self.model) or PerftState(self.model)
            layer = PerftLayer(target, site, state)
            self._replace_module(parent, target_name, layer, target)
            state.site_names.append(current_key)
        settings = self._settings(peft_config, current_key, site, self.model)
        layer.update_layer(adapter_name, settings, peft_config.init_weights)
        if peft_config.base_router != "frozen":
            self._tune_base_router(peft_config, adapter_name, site, settings, layer.state)

    def _tune_base_router(
        self, config: PerftConfig, adapter_name: str, site: ExpertsSite, settings: AdapterSettings, state: PerftState
    ) -> None:
        router = find_router(self.model, site)
        if router is None:
            raise ValueError(f"no router beside {site.name!r}")  # refused by _resolve_targets, unless PEFT skipped it
        module = self.model.get_submodule(router.name)
        if not isinstance(module, BaseRouterLayer):
            parent, _, attribute = router.name.rpartition(".")
            module = BaseRouterLayer(module, router, state.record_of(site.name), state)
            setattr(self.model.get_submodule(parent), attribute, module)
            state.site_names.append(router.name)
        rank = settings.rank if config.base_router == "lora" else None
        module.update_layer(adapter_name, rank, settings.lora_scale, config.init_weights)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would copy `weight` and move the adapter to its device; experts have none, and the layer has placed itself.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # FSDP1, for one, needs a single dtype
            for module in self.model.modules():
                if isinstance(module, PerftTunerLayer):
                    module.take_base_dtype(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Serve ``adapter_names``: one adapter name (or "__base__") per row of the batch, at inference."""
        names = kwargs.get("adapter_names")
        state = find_state(self.model)
        if names is None or state is None:
            yield
            return
        names = self._check_adapter_names(names)
        routed = {name for m in self.model.modules() if isinstance(m, BaseRouterLayer) for name in m.scales}
        if routed & set(names):
            raise ValueError(
                f"adapter_names: {', '.join(sorted(routed & set(names)))} tunes the base model's router, which a batch "
                "shares; run one adapter at a time"
            )
        wrappers = {name: m for name, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        for name, wrapper in wrappers.items():
            if isinstance(wrapper, ModulesToSaveWrapper) and not isinstance(wrapper.original_module, _MIXABLE):
                raise ValueError(
                    f"adapter_names: {name!r} ({type(wrapper.original_module).__name__}) is in modules_to_save, and PEFT "
                    "mixes only linear, embedding and convolution layers; run one adapter at a time"
                )
        handles = [
            wrapper.register_forward_pre_hook(_pass_adapter_names(names), with_kwargs=True)
            for wrapper in wrappers.values()
        ]
        state.row_adapters, state.rows_per_name = names, self._rows_per_name(args, kwargs)
        try:
            yield
        finally:
            state.row_adapters, state.rows_per_name = None, 1
            for handle in handles:
                handle.remove()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching by Transformers with the active adapters.

        Raises:
            ValueError: ``adapter_names`` given: its batches are packed, and it would ignore them.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names needs one sequence per row, and generate_batch packs sequences into one row; use "
                "generate() with adapter_names, or set_adapter() and generate_batch once per adapter"
            )
        return self.model.generate_batch(*args, **kwargs)

    def _check_adapter_names(self, names: Any) -> list[str]:
        if not isinstance(names, list | tuple):
            raise TypeError(
                f"adapter_names must be a list with one name per row of the batch; got {type(names).__name__}"
            )
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval(), or train one at a time"
            )
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"Names for adapter_names: {', '.join(self.peft_config)}, __base__"
            )
        return list(names)

    def _rows_per_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many rows generate makes of one: a beam or a returned sequence each; a forward makes none."""
        settings = [kwargs, vars(kwargs["generation_config"])] if kwargs.get("generation_config") else [kwargs]
        if args or "input_ids" in kwargs or "inputs" in kwargs:  # PeftModel hands these on in generate
            settings.append(vars(getattr(self.model, "generation_config", None) or object))
        counts = []
        for key in ("num_beams", "num_return_sequences"):
            counts.append(next((int(s[key]) for s in settings if s.get(key)), 1))
        return max(counts)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the sum of two routed adapters is not a routed adapter of the same size."""
        raise ValueError(
            "PERFT adapters cannot be averaged into one: their routers choose differently per token; activate several "
            "at once with model.base_model.set_adapter([...]), which adds their outputs"
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        state = find_state(self.model)
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        if state is not None:
            state.remove_hooks()
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict().keys()
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = _filter_state_dict_by_key_prefixes(dict.fromkeys(known), prefixes).keys()
        missing = [key for key in expected if key not in remapped]
        extra = [key for key in remapped if key not in known and key.removeprefix(KEY_PREFIX) not in known]
        if missing or extra:
            state = find_state(model)
            message = describe_key_mismatch(missing, extra)
            if state is None:
                raise ValueError(message)
            state.refuse_load(adapter_name, message)
        return remapped


def _check_base_router(config: PerftConfig, model: nn.Module, site: ExpertsSite) -> None:
    router = find_router(model, site)
    if router is None:
        raise ValueError(
            f"PerftConfig: base_router={config.base_router!r} needs a router beside {site.name!r} that is one weight row per "
            "expert applied to its input, and this block has none (or a packed one); leave it 'frozen'"
        )
    if is_quantised(model.get_submodule(router.name).get_parameter(router.weight_name)):
        raise ValueError(
            f"PerftConfig: base_router={config.base_router!r} adds to the weight of {router.name!r}, which is quantised; "
            "leave it 'frozen', or keep the router out of the quantisation"
        )


def _expert_ids(config: PerftConfig, name: str, num_experts: int) -> tuple[int, ...] | None:
    """The experts of one block that get an adapter of variant E; None for all."""
    ids = config.expert_ids
    if isinstance(ids, dict):
        if name not in ids:
            raise ValueError(
                f"PerftConfig: expert_ids has no entry for {name!r}, which is adapted; name its experts, or leave the layer "
                f"out by exclude_modules. Entries: {', '.join(list(ids)[:4])}{', ...' if len(ids) > 4 else ''}"
            )
        ids = ids[name]
    if ids is None:
        return None
    if max(ids) >= num_experts:
        raise ValueError(f"PerftConfig: expert_ids names expert {max(ids)} of {name!r}, which has {num_experts}")
    return tuple(ids)


def find_state(model: nn.Module) -> PerftState | None:
    """What the PERFT layers of a model share; None if it has none."""
    return next((module.state for module in model.modules() if isinstance(module, PerftLayer)), None)


def _shortest_names(targets: list[str], names: list[str]) -> set[str]:
    """The last name of the targets (usually just "experts") where it names nothing else, else their full names."""
    tails = {target.rpartition(".")[2] for target in targets}
    tunable = [n for n in names if not n.startswith(tuple(f"{target}." for target in targets))]
    hit = {name for name in tunable if name.rpartition(".")[2] in tails}
    return tails if hit == set(targets) else set(targets)


def _pass_adapter_names(names: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        repeat = 1 if rows is None else max(1, rows.shape[0] // len(names))
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeat)]}

    return hook
