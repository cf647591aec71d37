"""The numbers a configuration multiplies into the forward pass, as hooks on the stock modules they concern.

Hooks, because the modules stay what they are: their names, their weights, what PEFT, FSDP2, tensor parallelism and
``torch.compile`` do with them. A multiplier of 1 leaves no hook behind.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn


def multiply_embedding(embedding: nn.Module, config: Any) -> None:
    """Rows of the embedding times ``embedding_multiplier``."""
    if config.embedding_multiplier != 1 and not _has(embedding._forward_hooks, _multiply_output):
        embedding.register_forward_hook(partial(_multiply_output, config.embedding_multiplier))
        embedding.embed_scale = config.embedding_multiplier  # by this name PEFT scales a LoRA on it alike


def multiply_layer(layer: Any, config: Any) -> None:
    """Attention logits times ``attention_multiplier``, branches times ``residual_multiplier``, router logits divided."""
    if config.attention_multiplier is not None:
        layer.self_attn.scaling = config.attention_multiplier
    if config.residual_multiplier != 1:
        for branch in (layer.self_attn, layer.mlp):
            branch.register_forward_hook(partial(_multiply_output, config.residual_multiplier))
    if hasattr(layer.mlp, "gate"):  # a dense layer has no router
        divide_logits(layer.mlp.gate, config.router_logits_scaling)


def divide_logits(projection: nn.Module, scaling: float | None) -> None:
    """What a router or head makes, divided: its input is, which also keeps the logits small in half precision."""
    if scaling in (None, 1):
        return
    for module in projection.modules():  # what an adapter has wrapped, and copied, is divided outside of it
        for key in [key for key, hook in module._forward_pre_hooks.items() if _is(hook, _divide_input)]:
            module._forward_pre_hooks.pop(key)
    projection.register_forward_pre_hook(partial(_divide_input, scaling))
    projection.input_divisor = scaling  # type: ignore[assignment]  # for who computes these logits without calling it


def _has(hooks: dict[int, Any], function: Any) -> bool:
    """Whether it is among them already: a module may be handed back to the model it came from."""
    return any(_is(hook, function) for hook in hooks.values())


def _is(hook: Any, function: Any) -> bool:
    return getattr(hook, "func", None) is function


def _multiply_output(factor: float, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def _divide_input(divisor: float, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / divisor, *args[1:])
