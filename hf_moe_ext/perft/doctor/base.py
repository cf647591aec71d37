"""The base model without its weights: read from its config.json, built on the meta device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_moe_ext.host.blocks import ExpertsSite
from hf_moe_ext.host.families import BY_KEY, FAMILIES, active_experts, normalizes_top_k
from hf_moe_ext.host.quantization import expert_weights, quantises_linear_only, quantization_method, stored_bytes
from hf_moe_ext.perft.doctor.diagnosis import BaseSummary, Finding, FindingError, TargetError
from hf_moe_ext.perft.report import format_bytes

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def read_base_config(source: str, *, download: bool = True) -> PreTrainedConfig:
    """The configuration of a model: of a folder, of the local cache, or (``download``) of the Hub. Runs no remote code.

    Raises:
        TargetError: there is no model under that name.
        FindingError: there is one, but its config.json cannot be used.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise TargetError(_explain_folder(folder))
    if not folder.exists():
        _check_hub_id(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=not download)
    except OSError as error:
        if folder.exists():
            raise FindingError(
                "config-unreadable",
                f"{folder / 'config.json'} cannot be read: {_first_line(error)}",
                "restore the file",
            ) from error
        raise TargetError(
            f"{source!r} is neither a folder here nor a model whose config.json could be read from the Hub "
            f"({_first_line(error)}). Check the spelling; offline, name a local folder or a model in the cache; for a gated "
            "model, log in with `hf auth login`"
        ) from error
    except (ValueError, StrictDataclassError) as error:
        next_step = "correct config.json, or upgrade transformers if the model is newer than it"
        if "custom code" in str(error):
            next_step = "use a model that Transformers itself implements; code from model repositories is not run"
        message = f"the configuration of {source!r} cannot be used: {_first_line(error)}"
        raise FindingError("config-unusable", message, next_step) from error


def build_on_meta(config: PreTrainedConfig, task_type: str | None = None, class_name: str | None = None) -> nn.Module:
    """The model of this configuration with shapes and no storage.

    Args:
        config: the base model's.
        task_type: PEFT's; chooses the head.
        class_name: Transformers class that an adapter names, for one saved without a task type.

    Raises:
        FindingError: Transformers cannot build it.
    """
    build = _choose_builder(config, task_type, class_name)
    try:
        with torch.device("meta"):
            return build(config)
    except Exception as error:  # the configuration is the user's, and Transformers checks it wherever it first hurts
        raise FindingError(
            "model-not-built",
            f"Transformers {transformers.__version__} cannot build a model of type {config.model_type!r} from this "
            f"configuration: {type(error).__name__}: {_first_line(error)}",
            "correct config.json, or upgrade transformers if the model is newer than it",
        ) from error


def _choose_builder(config: PreTrainedConfig, task_type: str | None, class_name: str | None) -> Callable[..., Any]:
    if task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task_type]).from_config
    named = [class_name or ""]
    if type(config) not in AutoModelForCausalLM._model_mapping:
        named.extend(config.architectures or ())
    for name in named:
        model_class: Any = getattr(transformers, name, None)
        # The names come from files: only a model class, and only on its own kind of configuration.
        is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        if is_model and model_class.config_class is type(config):
            return model_class._from_config
    fits = (auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping)
    return next(fits, AutoModel).from_config


def summarize_base(source: str, config: PreTrainedConfig, model: nn.Module) -> BaseSummary:
    """Count the model's parameters and bytes; call it before an adapter is attached."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return BaseSummary(
        source=source,
        model_class=type(model).__name__,
        model_type=config.model_type,
        parameters=sum(sizes.values()),
        dtype=str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch."),
        weight_bytes=sum(count * dtype.itemsize for dtype, count in sizes.items()),
        quantization=quantization_method(config),
    )


def describe_router(site: ExpertsSite, model_config: Any) -> str:
    """The rule of the router in front of these experts, in words."""
    config: Any = getattr(site.experts, "config", model_config)
    active = active_experts(site.experts)
    chosen = f"top {active} of {site.num_experts} experts" if active else f"{site.num_experts} experts"
    try:
        sums_to_one = normalizes_top_k(site.experts, model_config)
    except ValueError:
        return f"{config.model_type}, {chosen}; whether their weights sum to 1 is not known"
    fixed = isinstance(FAMILIES.get(config.model_type), bool)
    source = "fixed in this family" if fixed else f"{BY_KEY}={getattr(config, BY_KEY, 'unset')}"
    rule = "their weights sum to 1" if sums_to_one else "their weights are not made to sum to 1"
    factor = getattr(config, "routed_scaling_factor", None)
    scaled = f", then times routed_scaling_factor={factor:g}" if isinstance(factor, int | float) and factor != 1 else ""
    return f"{config.model_type}, {chosen}; {rule} ({source}){scaled}"


def check_base(config: PreTrainedConfig, model: nn.Module) -> list[Finding]:
    """Settings of the base model that disturb the training of adapters, or cost more than they seem to.

    Args:
        config: the base model's.
        model: built from it, with an adapter or without.
    """
    return _check_aux_loss(config) + _check_quantization(config, model)


def _check_quantization(config: PreTrainedConfig, model: nn.Module) -> list[Finding]:
    weights = [tensor for _, _, tensor in expert_weights(model)]
    if not quantises_linear_only(config) or not weights:
        return []
    dtype = str(weights[0].dtype).removeprefix("torch.")
    size = format_bytes(sum(stored_bytes(weight) for weight in weights))
    return [
        Finding(
            "warning",
            "experts-not-quantised",
            f"the configuration says {quantization_method(config)}-quantised, but Transformers quantises linear layers with it, and the experts "
            f"of this model are fused tensors: all {len(weights)} of them stay {dtype}, {size} of the base weights. This is "
            "read off the configuration; what is in memory is said when the adapter is attached",
            "plan for these bytes, or take a checkpoint or method that quantises the experts",
        )
    ]


def _check_aux_loss(config: PreTrainedConfig) -> list[Finding]:
    text_config: Any = config.get_text_config()
    coefficient = getattr(text_config, "router_aux_loss_coef", None)
    if not getattr(text_config, "output_router_logits", False) or coefficient == 0:
        return []
    return [
        Finding(
            "warning",
            "base-aux-loss",
            "the base model's output_router_logits is on, so its loss includes the load-balance loss of its frozen routers "
            f"(router_aux_loss_coef={coefficient}); its gradient also trains the adapters of earlier layers",
            "load the base model with from_pretrained(..., output_router_logits=False); the adapters' own "
            "router_aux_loss_coef does not need it",
        )
    ]


def _check_hub_id(source: str) -> None:
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise TargetError(
            f"{source!r} is neither a folder here nor a Hub id (owner/name); check the spelling"
        ) from error


def _explain_folder(folder: Path) -> str:
    if folder.is_file():
        return f"{str(folder)!r} is a file; name its folder"
    below = sorted(str(path.parent) for path in folder.glob("*/adapter_config.json"))
    hint = f"; adapters lie in {', '.join(below[:5])}" if below else ""
    return f"the folder {str(folder)!r} holds neither config.json (a model) nor adapter_config.json (an adapter){hint}"


def _first_line(error: Exception) -> str:
    # Transformers' messages run over several lines of advice; the strict configurations put their cause on the second.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first.rstrip(".") or type(error).__name__
