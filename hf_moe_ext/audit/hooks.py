"""The hooks of ``watch_routing``: classes, not closures, because a copy or a pickle of a watched model must not fail on them.

Each passes over what gradient checkpointing runs again. None is compiled: the graph breaks there while somebody listens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.audit.batch import take_tags
from hf_moe_ext.host.routing import AdapterRouting

BASE = "base"


def is_recomputation() -> bool:
    """Whether gradient checkpointing runs this again: inside a backward, as ``torch.utils.checkpoint`` asks itself."""
    return torch._C._current_graph_task_id() != -1


def drop_tags(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook that takes the audit's own arguments out of a call."""
    return args, take_tags(kwargs)[0]


@dataclass
class BeginHook:
    """On the model, before: a pass begins, and the audit's own arguments end here."""

    seam: Any
    names: list[str]

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs, tags = take_tags(kwargs)
        if not is_recomputation():
            self.seam.begin(module, dict(zip(self.names, args, strict=False)) | kwargs, tags)
        return args, kwargs


@dataclass
class EndHook:
    """On the model, after it or its error."""

    seam: Any

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_recomputation():
            self.seam.end(module)


@dataclass
class RouterHook:
    """On a router: its logits are the first of its outputs that has a column for each expert."""

    seam: Any
    layer: str
    num_experts: int

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_recomputation():
            return
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self.num_experts,):
                self.seam.keep_logits(self.layer, value.detach())
                return


@dataclass
class ExpertsHook:
    """On the experts, before: what the router chose; ``always``: experts at the end that every token passes."""

    seam: Any
    layer: str
    num_experts: int
    names: list[str]
    always: int
    scoring: str

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if is_recomputation():
            return
        given = dict(zip(self.names, args[1:], strict=False)) | dict(kwargs)
        index, weights = (given[name] for name in self.names)
        if self.always:  # an expert for every token, which nobody chose, stands last
            index, weights = index[..., : -self.always], weights[..., : -self.always]
        self.seam.raise_event(self.layer, BASE, index, weights, self.num_experts, self.scoring)


@dataclass
class AdapterHook:
    """In the list of a module that announces its own routing."""

    seam: Any
    layer: str

    @torch.compiler.disable
    def __call__(self, routing: AdapterRouting) -> None:
        if is_recomputation():
            return
        num_experts = routing.logits.shape[-1]
        self.seam.raise_event(
            self.layer, routing.adapter, routing.index, routing.weights, num_experts, "softmax", routing
        )
