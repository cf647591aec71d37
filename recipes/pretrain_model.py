"""The model of a pre-training run: its configuration from keys, and its first weights on one process or on many."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from accelerate import PartialState
from distribution import build_distributed_config, refuse_layout
from finetune_arguments import UserError
from hf_moe_ext.mup import trainer_optimizer
from pretrain_arguments import CONFIG_CLASSES, PretrainArguments, PretrainTrainingArguments

MUP_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def build_config(arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """The configuration of the keys given; the tokenizer fills in the vocabulary and the special tokens left open.

    Args:
        arguments: The run's.
        tokenizer: None to check the keys before there is one.

    Raises:
        UserError: The configuration refuses a key, or has a smaller vocabulary than the tokenizer.
    """
    keys = {"use_cache": False, **arguments.config_keys}
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        keys = {"vocab_size": len(tokenizer), **special, **keys}
        if keys["vocab_size"] < len(tokenizer):
            raise UserError(
                f"--vocab_size {keys['vocab_size']} is less than the tokenizer's {len(tokenizer)} entries. Raise it, or "
                "leave it out."
            )
    try:
        config = CONFIG_CLASSES[arguments.model.model_type](**keys)
    except (ValueError, TypeError) as error:
        raise UserError(f"The model's configuration: {' '.join(str(error).split())}") from error
    except Exception as error:  # Transformers checks the kinds of some keys with errors of its own
        raise UserError(f"The model's configuration: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if arguments.model.experts_implementation is not None:
        config._experts_implementation = arguments.model.experts_implementation
    return config


def check_model(arguments: PretrainArguments) -> None:
    """Build the model without weights, so that a wrong key is an error before anything takes time.

    Raises:
        UserError: It cannot be built, or cannot be spread as asked.
    """
    outline = build_outline(build_config(arguments))
    refuse_layout(outline, arguments.model, arguments.training.world_size, arguments.model.dtype, "The model")
    choose_optimizer(outline, arguments.training)


def choose_optimizer(model: PreTrainedModel, training: PretrainTrainingArguments) -> Any:
    """What gives a µP model a learning rate per kind of tensor; None, the Trainer's own way, for another.

    Raises:
        UserError: µP does not know the optimizer, or cannot use the schedule.
    """
    if getattr(model.config, "mup", "none") == "none":  # a model of another family has no µP
        return None
    name = str(getattr(training.optim, "value", training.optim))
    if name not in MUP_OPTIMIZERS:
        raise UserError(f"--optim {name} with --mup {model.config.mup}: choose {' or '.join(MUP_OPTIMIZERS)}.")
    try:
        return trainer_optimizer(model, args=training, **({"fused": True} if name.endswith("fused") else {}))
    except ValueError as error:
        raise UserError(f"--mup {model.config.mup}: {error}") from error


def build_outline(config: Any) -> PreTrainedModel:
    """The model on the meta device, for counting and checking.

    Raises:
        UserError: It cannot be built.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"The model's configuration: {' '.join(str(error).split())}") from error


def build_model(config: Any, arguments: PretrainArguments) -> PreTrainedModel:
    """The model with the first weights that `--seed` draws, the same ones on one process and on many.

    `from_config` puts a whole model on every process whatever its layout: only `from_pretrained` splits one. So for a
    layout the first process draws the weights, saves them, and all processes load their parts. The first process has to
    hold the model once, as at the end, when it is saved.

    Raises:
        UserError: Transformers refuses the layout.
    """
    set_seed(arguments.training.seed)
    dtype = getattr(torch, arguments.model.dtype)
    layout = build_distributed_config(arguments.model, arguments.training.world_size)
    if layout is None:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = PartialState()
    folders: list[Any] = [None]
    if state.is_main_process:
        folders[0] = tempfile.mkdtemp(prefix=".building-", dir=arguments.output_dir)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folders[0])
    torch.distributed.broadcast_object_list(folders)
    options = (
        {} if config._experts_implementation is None else {"experts_implementation": config._experts_implementation}
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=dtype, distributed_config=layout, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"--ep_size, --fsdp_size, --tp_size: {' '.join(str(error).split())[:400]}") from error
    finally:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(folders[0], ignore_errors=True)
    return model


def describe_model(config: Any) -> dict[str, Any]:
    """Parameters by part, counted on an outline, and the keys that choose the blocks."""
    outline = build_outline(config)
    parts = {"experts": 0, "projections": 0, "routers": 0, "other": 0}
    for name, parameter in outline.named_parameters():
        if ".mlp.experts." in name:
            part = "experts"
        elif ".mlp.gate." in name:
            part = "routers"
        else:
            part = "projections" if ".mlp." in name else "other"
        parts[part] += parameter.numel()
    ours = ("moe_", "mup") if config.mup != "none" else ("moe_",)
    chosen = [f.name for f in dataclasses.fields(config) if f.name.startswith(ours)]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok")
    return {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in (*sizes, "vocab_size", *chosen)},
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
    }


def save_model(trainer: Any, folder: Path, use_cache: bool) -> None:
    """Save the trained model so that a killed run leaves none, or a whole one: written beside, then moved.

    Args:
        trainer: The Trainer; on every process, since a split model is gathered.
        folder: The output folder.
        use_cache: What the saved configuration says; training has no use for a cache.
    """
    staging = folder / ".building-model"
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    state.wait_for_everyone()
    trainer.model.config.use_cache = use_cache
    trainer.save_model(str(staging))
    state.wait_for_everyone()
    if state.is_main_process:
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):  # what names a model, last
            path.replace(folder / path.name)
        staging.rmdir()
