"""One forward and backward pass of a model seen from inside: the tensors that a coordinate check compares.

Hooks on the modules, and an attention function of our own name in Transformers' registries, which writes down the logits
and hands on to the stock function. No stock class or function is changed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_moe_ext.host.blocks import find_router, iterate_experts

# What is followed as a tensor: its size, and the size of its change since the start.
RESIDUAL, EXPERT_OUTPUT, LATENT = "residual", "expert_output", "latent"
ROUTER_LOGITS, ATTENTION_LOGITS, OUTPUT_LOGITS = "router_logits", "attention_logits", "output_logits"
FEATURES = (RESIDUAL, EXPERT_OUTPUT, LATENT, ROUTER_LOGITS, ATTENTION_LOGITS, OUTPUT_LOGITS)
# What is followed as a number.
ROUTER_LOGIT_GRADIENT, MAX_ROUTER_PROBABILITY = "router_logit_gradient", "max_router_probability"
OUTPUT_GRADIENT, COVARIANCE, COSINE = "expert_output_gradient", "covariance", "cosine"
WEIGHT_GRADIENT = "weight_gradient"
# What the router's learned weights alone say, (R_t - R_0) x_t: without R_0 (x_t - x_0), which is of size n^-1/2 under µP.
ROUTER_UPDATE = "router_update"

Key = tuple[str, int | None]  # quantity, layer; None: of the model as a whole

_STOCK_ATTENTION = "sdpa"
RECORDED_ATTENTION = "hf_moe_ext_recorded"
_RECORDER = "coord_check_recorder"  # attribute of an attention module: what its logits are handed to
_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Snapshot:
    """One pass.

    Attributes:
        loss: of the language model.
        features: (quantity, layer) -> tensor; quantities of ``FEATURES``.
        numbers: (quantity, layer) -> value.
    """

    loss: float
    features: dict[Key, Tensor] = field(default_factory=dict)
    numbers: dict[Key, float] = field(default_factory=dict)


def rms(tensor: Tensor) -> float:
    """Root of the mean of the squares of all entries."""
    tensor = tensor.detach().float() if tensor.dtype.itemsize < 4 else tensor.detach()
    return float(torch.linalg.vector_norm(tensor)) / tensor.numel() ** 0.5


def align(gradient: Tensor, output: Tensor) -> tuple[float, float]:
    """How the gradient at an output points along that output, token by token over the coordinates.

    Args:
        gradient: [..., hidden], of the loss with respect to ``output``.
        output: [..., hidden].

    Returns:
        RMS over tokens of the covariance and of the cosine. A mean over tokens would let signs cancel.
    """
    gradient, output = gradient.detach().double(), output.detach().double()
    centred = (gradient - gradient.mean(-1, keepdim=True)) * (output - output.mean(-1, keepdim=True))
    return rms(centred.mean(-1)), rms(nn.functional.cosine_similarity(gradient, output, dim=-1, eps=1e-300))


class Probe:
    """Watches a causal language model of an ``*_ext`` family.

    Args:
        model: will compute its attention by ``RECORDED_ATTENTION`` from now on, with the same results as "sdpa".
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._kept: dict[Key, Tensor] = {}
        self._handles: list[Any] = []
        self._attentions: list[nn.Module] = []
        self._first_routers: dict[int, Tensor] = {}
        self._router_updates: dict[int, float] = {}
        _register_attention()
        model.set_attn_implementation(RECORDED_ATTENTION)
        for layer, site in enumerate(iterate_experts(model)):
            block_name = site.name.rpartition(".")[0]
            decoder_layer: Any = model.get_submodule(block_name.rpartition(".")[0])
            router: Any = find_router(model, site)
            self._watch(model.get_submodule(router.name), (ROUTER_LOGITS, layer), with_gradient=True)
            self._watch_updates(model.get_submodule(router.name), router.weight_name, layer)
            self._watch(model.get_submodule(block_name), (EXPERT_OUTPUT, layer), with_gradient=True)
            if hasattr(model.get_submodule(block_name), "descend"):
                self._watch(site.experts, (LATENT, layer))
            self._watch(decoder_layer, (RESIDUAL, layer))
            setattr(decoder_layer.self_attn, _RECORDER, self._keeper((ATTENTION_LOGITS, layer)))
            self._attentions.append(decoder_layer.self_attn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for attention in self._attentions:
            delattr(attention, _RECORDER)

    def observe(self, tokens: Tensor) -> Snapshot:
        """Forward and backward on a batch; the gradients stay on the parameters.

        Args:
            tokens: ids [rows, length], inputs and labels alike.
        """
        self._kept.clear()
        output = self.model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=False)
        output.loss.backward()
        self._kept[OUTPUT_LOGITS, None] = output.logits
        numbers: dict[Key, float] = {(ROUTER_UPDATE, layer): size for layer, size in self._router_updates.items()}
        for (quantity, layer), tensor in self._kept.items():
            if quantity == ROUTER_LOGITS:
                numbers[ROUTER_LOGIT_GRADIENT, layer] = rms(_gradient(tensor))
                probabilities = tensor.detach().double().softmax(-1)
                numbers[MAX_ROUTER_PROBABILITY, layer] = float(probabilities.amax(-1).mean())
            elif quantity == EXPERT_OUTPUT:
                numbers[OUTPUT_GRADIENT, layer] = rms(_gradient(tensor))
                numbers[COVARIANCE, layer], numbers[COSINE, layer] = align(_gradient(tensor), tensor)
        for name, parameter in self.model.named_parameters():
            found = _LAYER.match(name)
            short = name[found.end() :] if found else name.removeprefix("model.")
            if parameter.grad is not None:
                numbers[f"{WEIGHT_GRADIENT}:{short}", int(found[1]) if found else None] = rms(parameter.grad)
        return Snapshot(
            float(output.loss.detach()), {key: tensor.detach() for key, tensor in self._kept.items()}, numbers
        )

    def _keeper(self, key: Key) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            self._kept[key] = tensor

        return keep

    def _watch(self, module: nn.Module, key: Key, with_gradient: bool = False) -> None:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if with_gradient:
                tensor.retain_grad()
            self._kept[key] = tensor

        self._handles.append(module.register_forward_hook(hook))

    def _watch_updates(self, router: nn.Module, weight_name: str, layer: int) -> None:
        """Keep the first weights; from the second pass on, the size of what has been added to them makes of the input."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
            weight = router.get_parameter(weight_name).detach()
            if layer not in self._first_routers:
                self._first_routers[layer] = weight.clone()
                return
            self._router_updates[layer] = rms(args[0].detach() @ (weight - self._first_routers[layer]).T)

        self._handles.append(router.register_forward_hook(hook))


def _gradient(tensor: Tensor) -> Tensor:
    """Zeros where the loss does not hang on it (a router whose chosen weights are always 1)."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _register_attention() -> None:
    """Enter the attention function and its mask; a second call writes the same again."""
    AttentionInterface.register(RECORDED_ATTENTION, _attend_recorded)
    AttentionMaskInterface.register(RECORDED_ATTENTION, AttentionMaskInterface()[_STOCK_ATTENTION])


def _attend_recorded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The stock attention; the logits go to the module's recorder before.

    Args:
        module: the attention module.
        query: [rows, heads, length, head_dim].
        key: [rows, key-value heads, length, head_dim].
        value: as ``key``.
        attention_mask: of the stock function.
        **kwargs: of the stock function; ``scaling`` is the factor on the logits.
    """
    recorder = getattr(module, _RECORDER, None)
    if recorder is not None:
        with torch.no_grad():
            keys = key.repeat_interleave(module.num_key_value_groups, dim=1)
            logits = query @ keys.transpose(-1, -2) * kwargs["scaling"]
            # Only what a token may see: the rest is masked away and trains nothing.
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            recorder(logits[..., seen])
    return AttentionInterface()[_STOCK_ATTENTION](module, query, key, value, attention_mask, **kwargs)
