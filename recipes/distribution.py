"""How one model is spread over the processes: `--fsdp_size`, `--ep_size`, `--tp_size`, as Transformers' own layout."""

import torch
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import SaveStrategy

import hf_moe_ext
from finetune_arguments import FinetuneTrainingArguments, LayoutArguments, ModelArguments, UserError


def build_distributed_config(arguments: LayoutArguments, num_processes: int) -> DistributedConfig | None:
    """The layout of the model; None for a model that every process holds whole.

    A `--fsdp_size` left out takes the processes that `--tp_size` leaves: each of those groups reads its own rows.

    Args:
        arguments: The sizes.
        num_processes: Of the whole run.

    Raises:
        UserError: The sizes do not fit each other or the number of processes.
    """
    sizes = {name: getattr(arguments, name) for name in ("fsdp_size", "ep_size", "tp_size")}
    if all(size is None for size in sizes.values()):
        return None
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"--{name} must be at least 1, got {size}.")
    tp_size, ep_size = sizes["tp_size"] or 1, sizes["ep_size"] or 1
    fsdp_size = sizes["fsdp_size"] or max(1, num_processes // tp_size)
    if fsdp_size * tp_size != num_processes:
        raise UserError(
            f"--fsdp_size {fsdp_size} times --tp_size {tp_size} must equal the number of processes, which is "
            f"{num_processes}. Start so many with `accelerate launch --num_processes`, or change the sizes."
        )
    if ep_size > 1 and (num_processes % ep_size or ep_size % tp_size):
        raise UserError(
            f"--ep_size {ep_size} must divide the number of processes, which is {num_processes}, and be a multiple of "
            f"--tp_size, which is {tp_size}. Start more with `accelerate launch --num_processes`, or change the sizes."
        )
    if num_processes == 1:
        return None
    config = DistributedConfig(fsdp_size=fsdp_size, ep_size=ep_size, tp_size=tp_size)
    if arguments.ep_implementation is not None:
        config.ep_implementation = arguments.ep_implementation
    return config


def check_distribution(layout: LayoutArguments, training: FinetuneTrainingArguments, num_processes: int) -> None:
    """Refuse a layout that cannot train here.

    Raises:
        UserError: See `build_distributed_config`; checkpoints to resume from; tensor parallelism on CPU.
    """
    config = build_distributed_config(layout, num_processes)
    if config is None:
        return
    strategy = SaveStrategy(training.save_strategy)
    if strategy != SaveStrategy.NO:
        raise UserError(
            f"--save_strategy {strategy.value}: Transformers cannot resume a model spread by "
            "--fsdp_size, --ep_size or --tp_size. Give --save_strategy no; what was trained is saved at the end."
        )
    if (config.tp_size or 1) > 1 and (training.use_cpu or not torch.accelerator.is_available()):
        raise UserError(
            f"--tp_size {config.tp_size}: accelerate has no tensor parallelism for CPU processes. Use --fsdp_size or "
            "--ep_size, or train on accelerators."
        )


def check_distributed_model(outline: PreTrainedModel, arguments: ModelArguments, num_processes: int) -> None:
    """Refuse a layout that this model cannot take, or that would silently leave it whole.

    Args:
        outline: The model, with or without weights.
        arguments: The sizes.
        num_processes: Of the whole run.

    Raises:
        UserError: For example experts that do not divide by `--ep_size`.
    """
    name = f"--model_name_or_path {arguments.model_name_or_path}"
    refuse_layout(outline, arguments, num_processes, arguments.dtype, name)


def refuse_layout(
    outline: PreTrainedModel, arguments: LayoutArguments, num_processes: int, dtype: str, name: str
) -> None:
    """`check_distributed_model` of a model with any name.

    Args:
        outline: The model, with or without weights.
        arguments: The sizes.
        num_processes: Of the whole run.
        dtype: Its weights' type.
        name: What the message calls it.

    Raises:
        UserError: The model cannot be spread this way.
    """
    layout = build_distributed_config(arguments, num_processes)
    if layout is None:
        return
    try:
        hf_moe_ext.check_distribution(
            outline.config, layout, model_class=type(outline), num_processes=num_processes, dtype=dtype
        )
    except ValueError as error:
        raise UserError(f"{name} cannot be spread this way: {error}") from error
