"""See what the adapter routers do: the share of tokens per expert and layer, and the auxiliary losses, apart from the loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_moe_ext.ops.routing import RouterSums, load_balance_loss, router_z_loss
from hf_moe_ext.perft.model import find_state
from hf_moe_ext.perft.step_load import sum_over_processes
from hf_moe_ext.perft.tape import ForwardTape


class RouterLoad:
    """Sums of router behaviour over the forward passes seen, kept on the model's device; reading them synchronises."""

    def __init__(self, training_only: bool = False) -> None:
        self.training_only = training_only
        self._sums: dict[tuple[str, str], RouterSums] = {}
        self._passes: dict[str, Tensor] = {}

    def __call__(self, tape: ForwardTape) -> None:
        """Add one forward pass."""
        if self.training_only and not tape.training:
            return
        for key, sums in tape.sums.items():
            sums = sums.detach().total()
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        for adapter in tape.coefficients:
            pooled = tape.pooled(adapter)
            values = torch.cat(
                [
                    load_balance_loss(pooled.counts, pooled.probabilities, pooled.tokens),
                    router_z_loss(pooled.squared_lse, pooled.tokens),
                    torch.ones_like(pooled.tokens),
                ]
            )
            self._passes[adapter] = self._passes[adapter] + values if adapter in self._passes else values

    def fractions(self, adapter: str = "default") -> dict[str, list[float]]:
        """Experts module -> share of the routed choices each adapter expert got (sums to 1), in layer order."""
        counts = {
            layer: sum_over_processes(sums.counts[0]) for (name, layer), sums in self._sums.items() if name == adapter
        }
        return {layer: (count / count.sum().clamp(min=1)).tolist() for layer, count in counts.items()}

    def losses(self, adapter: str = "default") -> dict[str, float]:
        """Mean load-balance and z-loss per pass, unweighted and pooled over the pass whatever the adapter's scope.

        Empty if the adapter has no router or nothing was seen.
        """
        if adapter not in self._passes:
            return {}
        load_balance, z, passes = sum_over_processes(self._passes[adapter]).tolist()
        return {"router_aux_loss": load_balance / passes, "router_z_loss": z / passes}

    def adapters(self) -> list[str]:
        """Adapters whose routers were seen."""
        return list(self._passes)

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums, self._passes = {}, {}


@contextmanager
def record_router_load(model: nn.Module) -> Iterator[RouterLoad]:
    """Record the routers of a PERFT model over the forward passes inside the block, in training or evaluation.

    Args:
        model: a model with PERFT adapters, wrapped or not. Variants without a router record nothing.

    Example:
        ``with record_router_load(model) as load: trainer.evaluate()`` and then ``load.fractions()``.
    """
    load, state = RouterLoad(), find_state(model)
    if state is not None:
        state.recorders.append(load)
    try:
        yield load
    finally:
        if state is not None:
            state.recorders.remove(load)


class RouterLoadCallback(TrainerCallback):
    """Adds the routers' auxiliary losses and load to the Trainer's logs, apart from the cross-entropy.

    Keys: ``router_aux_loss`` (unweighted; ``top_k`` is perfect balance), ``router_z_loss``, ``router_load_max`` (largest
    share of one expert in any layer) and ``router_load_entropy`` (mean over layers, 1 is perfect balance). Put it first
    in ``trainer.callback_handler.callbacks`` for reporters that should see the keys.
    """

    def __init__(self, model: nn.Module) -> None:
        state = find_state(model)
        if state is None:
            raise ValueError("RouterLoadCallback: the model has no PERFT adapter yet; attach it first (get_peft_model)")
        self.state = state
        self.load = RouterLoad(training_only=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording."""
        if self.load not in self.state.recorders:
            self.state.recorders.append(self.load)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording."""
        if self.load in self.state.recorders:
            self.state.recorders.remove(self.load)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the keys to this log line and start the next interval."""
        if logs is None or "loss" not in logs:
            return
        for adapter in self.load.adapters():
            suffix = "" if adapter == "default" else f"_{adapter}"
            shares = list(self.load.fractions(adapter).values())
            entropies = [_entropy(share) for share in shares]
            values = self.load.losses(adapter) | {
                "router_load_max": max(max(share) for share in shares),
                "router_load_entropy": sum(entropies) / len(entropies),
            }
            values = {f"{key}{suffix}": value for key, value in values.items()}
            logs.update(values)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(values)
        self.load.reset()


def _entropy(share: list[float]) -> float:
    if len(share) == 1:
        return 1.0
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))
