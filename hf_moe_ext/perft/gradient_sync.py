"""One adapter on all ranks of a model that Transformers itself distributes (``distributed_config=``).

Such a model owns the placement and the gradients of its base weights; nothing wraps it in DDP or FSDP again. An adapter
attached to it is a plain tensor on every rank, trained on that rank's tokens, so somebody must make the ranks start from
one value and step with one gradient. The Trainer does so since Transformers 5.22; a training loop of one's own, and the
Trainer before that, does not.

The gradient is averaged over all ranks by a node between the parameter and its use, not by a hook on the parameter: a
hook is lost whenever PEFT or a load puts a new parameter in place of the old one. The mean over all ranks is right in
every layout: the loss of a rank counts 1/dp_size, and the ranks of a tensor or expert parallel group, which share a
batch, have equal gradients. It is linear, so micro-batches may be averaged one by one, and idempotent, so that another
average on top (the Trainer's, DDP's) changes nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed(model: nn.Module | None) -> bool:
    """Whether Transformers has spread this model over several processes; false for one that DDP or FSDP wraps later."""
    return (
        getattr(model, "_device_mesh", None) is not None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def check_attachable(model: nn.Module, config: Any) -> None:
    """Raise for what an adapter of a distributed model cannot have.

    Raises:
        ValueError: pipeline stages (the ranks hold different layers, so an adapter has no counterpart elsewhere), or
            base parameters that are to be trained and saved with the adapter (they are shards here; PEFT would copy or
            save one rank's part).
    """
    if not is_distributed(model):
        return
    stages = getattr(getattr(getattr(model, "config", None), "distributed_config", None), "pp_size", 1) or 1
    if stages > 1:
        raise ValueError(
            f"PERFT cannot be attached to a model in pipeline stages, whose ranks hold different layers; got pp_size={stages}. "
            "Load it with DistributedConfig(fsdp_size=..., ep_size=..., tp_size=...) instead"
        )
    for name, idle in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
        value = getattr(config, name, idle)
        if value and value != idle:
            raise ValueError(
                f"PerftConfig: {name}={value!r} trains base parameters, which are shards in a model loaded with "
                "distributed_config; leave it out, or load the model whole and let accelerate wrap it"
            )


@torch.no_grad()
def broadcast(tensors: list[Tensor]) -> None:
    """Give every rank the values of rank 0. All ranks call this with the same shapes, in the same order."""
    for tensor in tensors:
        if not tensor.is_meta:
            dist.broadcast(tensor.data, src=0)


def share_gradient(parameter: Tensor) -> Tensor:
    """``parameter`` unchanged; in backward, its gradient becomes the mean over all ranks."""
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter
    if getattr(parameter, "_replicated_grad_hook_registered", False):
        return parameter  # the Trainer's mark: it averages this one itself, once per step rather than per micro-batch
    return _MeanGradient.apply(parameter)


class _MeanGradient(torch.autograd.Function):
    """Identity; backward averages over all ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()
