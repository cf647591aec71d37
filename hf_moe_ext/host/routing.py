"""How a module that routes tokens by itself, beside the base model's router, tells whoever listens.

Such a module (PERFT's layer, with a router per adapter) has a list ``routing_listeners`` and calls each with one
``AdapterRouting`` per routing. Who wants to know adds itself to the list and needs to know nothing of the module's kind.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterRouting:
    """What one adapter's router did with the rows of one call.

    Attributes:
        adapter: its name.
        logits: [rows, num_experts], before the softmax over all.
        index: [rows, top_k] chosen adapter experts.
        weights: [rows, top_k] as they multiply the experts' outputs.
        rows: [rows] their numbers among the rows of the experts' call; None: all of them, in order.
    """

    adapter: str
    logits: Tensor
    index: Tensor
    weights: Tensor
    rows: Tensor | None = None


RoutingListeners = list[Callable[[AdapterRouting], None]]


def find_announcers(model: nn.Module) -> Iterator[tuple[str, RoutingListeners]]:
    """Path of the experts whose rows are routed, and the list to join, of each module that announces its routing."""
    for module in model.modules():
        listeners, name = getattr(module, "routing_listeners", None), getattr(module, "site_name", None)
        if isinstance(listeners, list) and isinstance(name, str):
            yield name, listeners
