"""``watch_routing``: the one seam to a model's routing. Hooks only; nothing is replaced, and all are gone afterwards.

A base model's routing is read where its experts are called, so ids are global under expert parallelism too, and whatever
chose them has chosen. Probabilities come from what the router beside the experts returned just before. An adapter's
router announces itself (``host/routing.py``). What gradient checkpointing runs again, inside a backward, is no event.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.audit.batch import BatchFacts, cached_length, read_batch, take_tags
from hf_moe_ext.host.blocks import explain_no_blocks, find_router, iterate_experts
from hf_moe_ext.host.families import router_scoring
from hf_moe_ext.host.routing import AdapterRouting, find_announcers
from hf_moe_ext.ops.routing import routing_probabilities

BASE = "base"


@dataclass(frozen=True)
class RoutingEvent:
    """One router in one forward pass; tensors on the layer's device, without gradient.

    Attributes:
        layer: path of the experts module in the unwrapped model.
        router: "base", or the PEFT adapter's name.
        num_experts: ids the router can send.
        index: [tokens, top_k] chosen experts; an id outside 0..num_experts-1 is a choice that no expert serves.
        weights: [tokens, top_k] as the experts got them.
        probabilities: [tokens, num_experts] the router's distribution, at least float32; None where it cannot be had.
        batch: what is known of these tokens.
    """

    layer: str
    router: str
    num_experts: int
    index: Tensor
    weights: Tensor
    probabilities: Tensor | None
    batch: BatchFacts


Listener = Callable[[RoutingEvent], None]


@contextmanager
def watch_routing(model: nn.Module, listener: Listener, slices: Sequence[str] = ()) -> Iterator[None]:
    """Call ``listener`` with each router's choices in every forward pass inside the block.

    Args:
        model: any model with experts that are called with (hidden_states, index, weights), wrapped (PEFT, DDP, a compiled
            one) or not.
        listener: called within the forward, under ``no_grad``; what it reads back from the device is waited for.
        slices: names of the numbers that a ``SliceCollator`` put into the batches.

    Raises:
        ValueError: the model has no such block.

    Adapters added inside the block are not seen. Enter before the first call of a model under ``torch.compile``: what was
    compiled without hooks runs without them.
    """
    seam = seam_of(model)
    seam.add(listener, slices)
    try:
        yield
    finally:
        seam.remove(listener)


def unwrap(model: nn.Module) -> nn.Module:
    """The model of Transformers inside compiled, distributed and PEFT wrappers."""
    model = unwrap_runners(model)
    if hasattr(model, "get_base_model"):
        return unwrap(model.get_base_model())  # type: ignore[operator]
    return model


def unwrap_runners(model: nn.Module) -> nn.Module:
    """The model, or PEFT's wrapper of it, inside compiled and distributed wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


_seams: "weakref.WeakKeyDictionary[nn.Module, RoutingSeam]" = weakref.WeakKeyDictionary()


def seam_of(model: nn.Module) -> "RoutingSeam":
    """The seam of a model, one whoever listens, so that everything is read once.

    Raises:
        ValueError: the model has no block it could serve.
    """
    inner = unwrap(model)
    if inner not in _seams:
        _seams[inner] = RoutingSeam(inner)
    return _seams[inner]


class RoutingSeam:
    """The hooks on one model and who listens to them; it holds no module, so that it keeps no model alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.experts = {site.name: site.num_experts for site in iterate_experts(model)}
        if not self.experts:
            raise ValueError(f"{explain_no_blocks(model)}; the routing audit needs a Mixture-of-Experts model")
        self._listeners: list[Listener] = []
        self._names: tuple[str, ...] = ()
        self._handles: list[Any] = []
        self._announcers: list[tuple[list[Any], Any]] = []
        self._keeps_out_tags = False
        self._pass: _Pass | None = None
        self._logits: dict[str, Tensor] = {}

    def add(self, listener: Listener, slices: Sequence[str] = ()) -> None:
        """Let ``listener`` hear every event from now on."""
        if slices and self._names and tuple(slices) != self._names:
            raise ValueError(
                f"slices must be the same for all who listen to a model: {self._names}, got {tuple(slices)}"
            )
        self._names = tuple(slices) or self._names
        self._listeners.append(listener)
        if len(self._listeners) == 1:
            self._install()

    def remove(self, listener: Listener) -> None:
        """Forget a listener; with the last one the hooks go."""
        self._listeners.remove(listener)
        if not self._listeners:
            self._uninstall()

    def keep_out_tags(self) -> None:
        """From now on take what a ``SliceCollator`` put into the batches out again, also while nobody listens."""
        if not self._keeps_out_tags:
            self._keeps_out_tags = True
            self._installed_model().register_forward_pre_hook(_drop_tags, with_kwargs=True)

    def _installed_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the model whose routing was to be watched has been deleted")
        return model

    def _install(self) -> None:
        model = self._installed_model()
        # Some trainers call the decoder and the head by themselves: the first of the two that is called begins the pass.
        decoder = getattr(model, "base_model", model)
        for module in [model] if decoder is model else [model, decoder]:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self._handles += [
                module.register_forward_pre_hook(_BeginHook(self, names), with_kwargs=True, prepend=True),
                module.register_forward_hook(_EndHook(self), always_call=True),
            ]
        for site in iterate_experts(model):
            block = model.get_submodule(site.name.rpartition(".")[0])
            always = getattr(block, "num_always_active", 0)
            router = find_router(model, site, site.num_experts - always)
            if router is not None:
                module = model.get_submodule(router.name)
                hook = _RouterHook(self, site.name, router.num_experts)
                self._handles.append(module.register_forward_hook(hook))
            scoring = router_scoring(getattr(site.experts, "config", getattr(model, "config", None)))
            names = [site.index_name, site.weights_name]
            experts_hook = _ExpertsHook(self, site.name, site.num_experts - always, names, always, scoring)
            self._handles.append(site.experts.register_forward_pre_hook(experts_hook, with_kwargs=True))
        for name, listeners in find_announcers(model):
            announced = _AdapterHook(self, name)
            listeners.append(announced)
            self._announcers.append((listeners, announced))

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        for listeners, announced in self._announcers:
            listeners.remove(announced)
        self._handles, self._announcers, self._names, self._pass = [], [], (), None
        self._logits.clear()

    def begin(self, module: nn.Module, inputs: dict[str, Any], tags: dict[str, Any]) -> None:
        """A forward pass of the model begins."""
        if self._pass is None:
            self._pass = _Pass(id(module), inputs, tags, cached_length(inputs))
            self._logits.clear()

    def end(self, module: nn.Module) -> None:
        """It is over, or has raised."""
        if self._pass is not None and self._pass.owner == id(module):
            self._pass = None
            self._logits.clear()

    def keep_logits(self, layer: str, logits: Tensor) -> None:
        """Remember what a router returned until its experts are called."""
        self._logits[layer] = logits

    def raise_event(
        self,
        layer: str,
        router: str,
        index: Tensor,
        weights: Tensor,
        num_experts: int,
        scoring: str,
        routing: AdapterRouting | None = None,
    ) -> None:
        """Tell all listeners; ``routing``: of an adapter, whose logits come with it."""
        logits = self._logits.pop(layer, None) if routing is None else routing.logits
        rows = None if routing is None else routing.rows
        # Sums that a listener keeps must outlive an inference mode, and none of this is for autocast to round.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(index.device.type, enabled=False):
            index, weights = index.reshape(-1, index.shape[-1]), weights.detach().reshape(-1, weights.shape[-1])
            facts = self._facts(layer, index, rows)
            probabilities = None
            if logits is not None and logits.numel() == len(index) * num_experts:
                probabilities = routing_probabilities(logits.detach().reshape(-1, num_experts), scoring)
            event = RoutingEvent(layer, router, num_experts, index.detach(), weights, probabilities, facts)
            for listener in list(self._listeners):
                listener(event)

    def _facts(self, layer: str, index: Tensor, rows: Tensor | None) -> BatchFacts:
        if self._pass is None:  # called past the model: nothing is known of these tokens
            return _unknown(len(index), index.device)
        tokens = len(index) if rows is None else None
        return self._pass.facts(layer, tokens, index.device, self._names, rows) or _unknown(len(index), index.device)


class _Pass:
    """One forward pass of the model; its facts are read once per device, when the first layer asks."""

    def __init__(self, owner: int, inputs: dict[str, Any], tags: dict[str, Any], cached: int | Tensor) -> None:
        self.owner, self.inputs, self.tags, self.cached = owner, inputs, tags, cached
        self._facts: dict[tuple[int, torch.device], BatchFacts | None] = {}
        self._tokens = 0

    def facts(
        self, layer: str, tokens: int | None, device: torch.device, names: Sequence[str], rows: Tensor | None
    ) -> BatchFacts | None:
        """The facts of all tokens, or of those in ``rows``; None where the layer's rows are not the input's tokens."""
        tokens = self._tokens if tokens is None else tokens
        self._tokens, key = tokens, (tokens, device)
        if key not in self._facts:
            found = self._facts[key] = read_batch(self.inputs, self.tags, names, self.cached, tokens, device)
            if found is None:
                warnings.warn(
                    f"routing audit: the experts of {layer} receive {tokens} rows, which are not the tokens of the model's "
                    "input; padding and data slices cannot be told apart there, so every routed row counts",
                    stacklevel=2,
                )
        facts = self._facts[key]
        return None if facts is None else facts.select(rows)


def _unknown(tokens: int, device: torch.device) -> BatchFacts:
    nowhere = torch.full((tokens,), -1, device=device)
    return BatchFacts(None, None, nowhere, nowhere)


def is_recomputation() -> bool:
    """Whether gradient checkpointing runs this again: inside a backward, as ``torch.utils.checkpoint`` asks itself."""
    return torch._C._current_graph_task_id() != -1


def _drop_tags(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, take_tags(kwargs)[0]


# The hooks are classes, not closures: a copy or a pickle of a watched model must not fail on them.


@dataclass
class _BeginHook:
    seam: RoutingSeam
    names: list[str]

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs, tags = take_tags(kwargs)
        if not is_recomputation():
            self.seam.begin(module, dict(zip(self.names, args, strict=False)) | kwargs, tags)
        return args, kwargs


@dataclass
class _EndHook:
    seam: RoutingSeam

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_recomputation():
            self.seam.end(module)


@dataclass
class _RouterHook:
    seam: RoutingSeam
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
class _ExpertsHook:
    seam: RoutingSeam
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
class _AdapterHook:
    seam: RoutingSeam
    layer: str

    @torch.compiler.disable
    def __call__(self, routing: AdapterRouting) -> None:
        if is_recomputation():
            return
        num_experts = routing.logits.shape[-1]
        self.seam.raise_event(
            self.layer, routing.adapter, routing.index, routing.weights, num_experts, "softmax", routing
        )
