"""The model of a run: loading it, and making it trainable the way `--peft` says."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distribution import build_distributed_config
from finetune_arguments import AdapterArguments, ModelArguments, UserError
from hf_moe_ext import PerftConfig, choose_experts_to_adapt, count_trainable

LORA_TARGETS = ("q_proj", "v_proj")
CALIBRATION_ROWS = 256


def build_adapter_config(
    arguments: AdapterArguments, expert_ids: dict[str, list[int]] | None = None
) -> PerftConfig | LoraConfig | None:
    """The PEFT configuration of `--peft`; None for full and none.

    Args:
        arguments: The settings.
        expert_ids: Experts that E adapts, per module; None for all.

    Raises:
        UserError: The settings contradict each other.
    """
    targets = arguments.lora_target_modules
    try:
        if arguments.peft == "perft":
            return PerftConfig(
                task_type="CAUSAL_LM",
                variant=arguments.variant,
                adapter=arguments.adapter,
                r=arguments.r,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=arguments.lora_dropout,
                num_experts=arguments.num_experts,
                top_k=arguments.top_k,
                normalize_top_k=arguments.normalize_top_k,
                router_aux_loss_coef=arguments.router_aux_loss_coef,
                router_z_loss_coef=arguments.router_z_loss_coef,
                router_aux_loss_scope=arguments.router_aux_loss_scope,
                base_router=arguments.base_router,
                base_router_drift_coef=arguments.base_router_drift_coef,
                shared_A=arguments.shared_A,
                expert_ids=expert_ids,
                target_modules=targets,
            )
        if arguments.peft == "lora":
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=arguments.r,
                lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]  # any number will do
                lora_dropout=arguments.lora_dropout,
                target_modules=list(targets or (() if arguments.lora_target_parameters else LORA_TARGETS)),
                target_parameters=arguments.lora_target_parameters,
            )
    except (ValueError, TypeError) as error:
        raise UserError(f"--peft {arguments.peft}: {error}") from error
    return None


def load_tokenizer(arguments: ModelArguments, path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: There is none, or it cannot end a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", arguments, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model_name_or_path {arguments.model_name_or_path}: its tokenizer has no end-of-text token, so answers "
            "could not end. Set 'eos_token' in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended to and never scored, so any token does
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(arguments: ModelArguments, path: str, num_processes: int = 1) -> PreTrainedModel:
    """The causal language model, spread over the processes where a size asks for that.

    Raises:
        UserError: It cannot be loaded.
    """
    settings = {
        "attn_implementation": arguments.attn_implementation,
        "distributed_config": build_distributed_config(arguments, num_processes),
    }
    options: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=arguments.model_revision,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load("model", arguments, error) from error
    model.config.use_cache = False  # training has no use for it; `generate` asks for it itself
    return model


def load_outline(arguments: ModelArguments) -> PreTrainedModel:
    """The model without weights, on the meta device: enough to see whether an adapter fits, and read in a second.

    Raises:
        UserError: There is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(
            arguments.model_name_or_path,
            revision=arguments.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load("model", arguments, error) from error


def attach(
    model: PreTrainedModel,
    arguments: AdapterArguments,
    rows: Dataset | None = None,
    collator: Any = None,
    checkpoint: str | None = None,
) -> torch.nn.Module:
    """Add the adapter; the model itself for full and none.

    Args:
        model: The base model.
        arguments: The settings.
        rows: Encoded train rows, for `--expert_fraction`; None leaves the choice of experts out (an outline has no weights).
        collator: Makes batches of them.
        checkpoint: To go on from, whose experts are kept.

    Raises:
        UserError: The model cannot take it.
    """
    fraction = arguments.expert_fraction if (arguments.peft, arguments.variant) == ("perft", "E") else None
    try:
        expert_ids = None
        if fraction is not None and checkpoint is not None:
            expert_ids = json.loads(Path(checkpoint, "adapter_config.json").read_text(encoding="utf-8"))["expert_ids"]
        elif fraction is not None and rows is not None:
            first = rows.select(range(min(CALIBRATION_ROWS, len(rows)))).to_list()
            batches = (collator(first[i : i + 8]) for i in range(0, len(first), 8))
            expert_ids = choose_experts_to_adapt(model, batches, fraction)
        config = build_adapter_config(arguments, expert_ids)
        return model if config is None else get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--peft {arguments.peft}: {error}") from error


def count_parameters(model: torch.nn.Module) -> dict[str, int | None]:
    """Trainable parameters, and how many of them one token uses; what is not a PERFT adapter is used whole."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stored, active = count_trainable(model)
    return {"trainable": trainable, "active": None if active is None else trainable - stored + active}


def _cannot_load(what: str, arguments: ModelArguments, error: Exception) -> UserError:
    reason = inspect.cleandoc(str(error)).split("\n")[0][:300]
    return UserError(
        f"--model_name_or_path {arguments.model_name_or_path}: its {what} cannot be loaded: {reason} "
        "Give a model of the Hub (and be online), a folder, or 'quickstart'."
    )
