"""Find and read the MoE blocks of a model. Nothing else in the package walks a model's modules to find them.

A block is recognised by structure, not by name: its ``experts`` module is called with (hidden_states, index, weights),
as every Transformers-v5 family with fused experts does. Dense layers between MoE layers have no such module.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_INDEX, _WEIGHTS = re.compile("ind(ex|ices)|selected"), re.compile("weight")


@dataclass(frozen=True)
class ExpertsSite:
    """Where a block keeps its experts and what they expect.

    Attributes:
        name: module path of the experts, as in ``named_modules`` of the unwrapped model.
        experts: the experts module itself (below any tuner layer).
        num_experts: ids the block's router can send, before expert parallelism.
        hidden_size: width of the rows the experts receive (a latent width where the block projects first).
        index_name: keyword of the index argument.
        weights_name: keyword of the weights argument.
    """

    name: str
    experts: nn.Module
    num_experts: int
    hidden_size: int
    index_name: str
    weights_name: str


@dataclass(frozen=True)
class RouterSite:
    """The router beside a block's experts.

    Attributes:
        name: module path, as in ``named_modules`` of the unwrapped model.
        weight_name: path of its weight [num_experts, hidden] inside the module.
        bias_name: path of a bias [num_experts] beside that weight; None without one.
        num_experts: rows of the weight.
        hidden_size: columns of the weight: the width the router reads.
    """

    name: str
    weight_name: str
    bias_name: str | None
    num_experts: int
    hidden_size: int


def find_router(model: nn.Module, site: ExpertsSite, num_experts: int | None = None) -> RouterSite | None:
    """The router of a block, by structure: beside the experts, one weight row for each of them, applied to its input.

    Args:
        model: the model the site is from.
        site: the block's experts.
        num_experts: rows of its weight, where some experts are for every token and no row stands for them.
    """
    num_experts = site.num_experts if num_experts is None else num_experts
    block_name = site.name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    children = dict(block.named_children())
    for child in ("gate", "router", *children):
        module = children.get(child)
        while module is not None and hasattr(module, "base_layer"):
            module = module.base_layer  # type: ignore[assignment]
        if module is None or child == site.name.rpartition(".")[2]:
            continue
        parameters = dict(module.named_parameters())
        weights = [n for n, p in parameters.items() if p.ndim == 2 and p.shape[0] == num_experts]
        # A scale or norm [hidden] before the weight (Gemma 4): the weight does not see the rows the router is called with.
        transforms = len(weights) == 1 and any(
            p.ndim == 1 and p.shape[0] == parameters[weights[0]].shape[1] != num_experts for p in parameters.values()
        )
        if len(weights) == 1 and not transforms:
            bias = weights[0].removesuffix("weight") + "bias"
            rows, width = parameters[weights[0]].shape
            return RouterSite(
                f"{block_name}.{child}".lstrip("."), weights[0], bias if bias in parameters else None, rows, width
            )
    return None


def routing_arguments(module: nn.Module) -> tuple[str, str] | None:
    """Names of the index and weights arguments of an experts module; None if it is not called that way."""
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return None  # Switch Transformers: its "selected_experts" is a one-hot mask, not an index
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(positional) != 3 or len(parameters) != 3:
        return None
    _, index, weights = (p.name for p in positional)
    return (index, weights) if _INDEX.search(index) and _WEIGHTS.search(weights) else None


def read_experts(name: str, module: nn.Module) -> ExpertsSite | None:
    """Describe one module as a block's experts, looking below tuner layers; None if it is something else."""
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    arguments = routing_arguments(module)
    if arguments is None:
        return None
    return ExpertsSite(name, module, _num_experts(module), _input_size(module), *arguments)


def iterate_experts(model: nn.Module) -> Iterator[ExpertsSite]:
    """All experts modules of a model, in the order of its layers; tuner layers are looked through."""
    for name, module in model.named_modules():
        if routing_arguments(module) is None:
            continue
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        site = read_experts(name, module)
        if site is not None:
            yield site


def explain_no_blocks(model: nn.Module) -> str:
    """One sentence on why a model has no block we can serve, naming what was found instead."""
    owner = f"{type(model).__name__} (model_type {getattr(getattr(model, 'config', None), 'model_type', None)!r})"
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            arguments = ", ".join(list(inspect.signature(type(module).forward).parameters)[1:])
            return (
                f"The MoE blocks of {owner} cannot be served: {type(module).__name__} at {name!r} takes ({arguments}), "
                "not (hidden_states, index, weights)"
            )
    return f"No MoE block found in {owner}"


def _num_experts(experts: nn.Module) -> int:
    # LongCat counts identity experts into its ids: total_experts. Expert parallelism rewrites num_experts to the local
    # count, when the model is loaded, but a weight it has sharded still has its global shape.
    sharded = next((p for p in experts.parameters(recurse=False) if p.ndim == 3 and hasattr(p, "device_mesh")), None)
    names = ("total_experts", "num_experts", "num_local_experts")
    for name in names[:1] if sharded is not None else names:
        count = getattr(experts, name, None)
        if isinstance(count, int):
            return count
    return sharded.shape[0] if sharded is not None else next(p.shape[0] for p in experts.parameters() if p.ndim == 3)


def _input_size(experts: nn.Module) -> int:
    # Weights first: Nemotron-H sets hidden_dim to the model's width although its experts may work in a latent width.
    # Quantised weights are packed, so only a three-dimensional floating tensor is believed.
    for name in ("gate_up_proj", "up_proj"):
        weight = getattr(experts, name, None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 3 and weight.is_floating_point():
            return weight.shape[1 if getattr(experts, "is_transposed", False) else 2]
    for name in ("hidden_dim", "hidden_size"):
        size = getattr(experts, name, None)
        if isinstance(size, int):
            return size
    raise TypeError(f"cannot tell the input width of {type(experts).__name__}: no hidden_dim and no fused weight")
