"""Attach an adapter to a model on the meta device and read off what trains."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from hf_moe_ext.host.blocks import iterate_experts
from hf_moe_ext.perft.adapter_files import KEY_PREFIX
from hf_moe_ext.perft.config import PerftConfig
from hf_moe_ext.perft.doctor.base import describe_router
from hf_moe_ext.perft.doctor.diagnosis import Diagnosis, Finding, FindingError, RouterSummary
from hf_moe_ext.perft.layer import PerftLayer
from hf_moe_ext.perft.report import trainable_rows

# As many experts per block as the largest common families have (Qwen3 128, DeepSeek-V3 256); OLMoE has 64.
MANY_EXPERTS = 128

_NOT_SETTINGS = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}


@contextmanager
def warnings_as_findings(findings: list[Finding], code: str) -> Iterator[None]:
    """What our configuration and PEFT warn about inside the block becomes findings; other warnings stay warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        # PEFT 0.21 asks for a property under the name it had before Transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        try:
            yield
        finally:
            findings.extend(Finding("warning", code, str(w.message)) for w in caught if _is_ours(w))
    for warning in caught:
        if not _is_ours(warning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning)


def build_settings(options: dict[str, Any], findings: list[Finding]) -> PerftConfig:
    """The configuration of a new adapter.

    Raises:
        FindingError: the options mean nothing together.
    """
    try:
        with warnings_as_findings(findings, "option-warning"):
            return PerftConfig(**options)
    except ValueError as error:
        raise FindingError(
            "options-refused", str(error), "change the option, or leave it out for its default"
        ) from error


def settings_as_dict(config: PerftConfig) -> dict[str, Any]:
    """The adapter's own settings for people and JSON: what is set, without PEFT's bookkeeping."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _NOT_SETTINGS}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in fields.items()
        if value not in (None, {}, [])
    }


def attach(model: nn.Module, config: PerftConfig, diagnosis: Diagnosis) -> dict[str, Tensor]:
    """Attach the adapter and enter what trains, its cost and its routing into the diagnosis.

    Args:
        model: the base model on the meta device; changed.
        config: the adapter's; not changed.
        diagnosis: filled in.

    Returns:
        The tensors its file holds, on the meta device, by their names on disk.

    Raises:
        FindingError: the model has no MoE block, or one that cannot be served as asked.
    """
    config = copy.deepcopy(config)
    # A saved adapter's file says "for inference" and names its base; here it is to be trained on the one given.
    config.inference_mode, config.base_model_name_or_path = False, None
    try:
        with warnings_as_findings(diagnosis.findings, "attach-warning"):
            peft_model: Any = get_peft_model(model, config)
    except NoMatchingPeftModuleError as error:
        if any(iterate_experts(model)):
            next_step = "name some of these modules, or leave the selection out"
            raise FindingError("nothing-selected", str(error), next_step) from error
        next_step = "choose a base model of a supported family, or adapt this one with PEFT's LoRA"
        raise FindingError("no-moe-block", str(error), next_step) from error
    except (ValueError, TypeError) as error:
        raise FindingError("attach-refused", str(error), "change the option named here") from error
    diagnosis.rows = trainable_rows(peft_model)
    diagnosis.also_trains = {
        name.removeprefix(KEY_PREFIX).replace(".modules_to_save.default", ""): tuple(parameter.shape)
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad and ".perft_" not in name
    }
    diagnosis.router = _summarize_router(peft_model, config)
    diagnosis.findings.extend(_check_size(peft_model, diagnosis))
    return get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def _summarize_router(peft_model: Any, config: PerftConfig) -> RouterSummary:
    model_config = peft_model.get_base_model().config
    sites = {site.name: site for site in iterate_experts(peft_model.get_base_model())}
    rule = "\n".join(dict.fromkeys(describe_router(site, model_config) for site in sites.values()))
    if config.variant == "E":
        return RouterSummary(rule, None, "variant E uses the base router's weights as they reach the experts")
    if config.variant != "R":
        return RouterSummary(rule, None, f"variant {config.variant} does not route: every adapter has weight 1")
    if config.top_k == 1:
        reason = "never True at top_k=1, where dividing the one weight by itself would cut the router's gradient"
    elif config.normalize_top_k is None:
        reason = "not set, so it follows the base router"
    else:
        reason = "as set"
    normalize = any(layer.settings["default"].normalize for layer in _layers(peft_model))
    return RouterSummary(rule, normalize, reason)


def _check_size(peft_model: Any, diagnosis: Diagnosis) -> list[Finding]:
    settings = [layer.settings["default"] for layer in _layers(peft_model)]
    largest = max(setting.num_experts for setting in settings)
    if settings[0].variant != "E" or largest < MANY_EXPERTS:
        return []
    share = f", {diagnosis.share_of_base:.1%} of the base model" if diagnosis.share_of_base else ""
    active = f"{diagnosis.active_parameters:,}" if diagnosis.active_parameters else "few"
    return [
        Finding(
            "warning",
            "many-experts",
            f"variant E gives each of {largest} base experts in {len(settings)} blocks an adapter: "
            f"{diagnosis.adapter_parameters:,} parameters{share}, of which a token uses {active}",
            "lower r, adapt fewer layers (layers_to_transform), or take variant R, whose size does not grow with the "
            "base model's experts",
        )
    ]


def _layers(peft_model: nn.Module) -> list[PerftLayer]:
    return [module for module in peft_model.modules() if isinstance(module, PerftLayer)]
