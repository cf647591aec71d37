"""See what the adapter routers do: the share of tokens per expert and layer, and the auxiliary losses, apart from the loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_moe_ext.ops.reduction import sum_over_processes
from hf_moe_ext.ops.routing import DriftSums, RouterSums, load_balance_loss, router_z_loss
from hf_moe_ext.perft.model import find_state
from hf_moe_ext.perft.tape import ForwardTape


class RouterLoad:
    """Sums of router behaviour over the forward passes seen, kept on the model's device; reading them synchronises."""

    def __init__(self, training_only: bool = False) -> None:
        self.training_only = training_only
        self._sums: dict[tuple[str, str], RouterSums] = {}
        self._passes: dict[str, Tensor] = {}
        self._drift: dict[tuple[str, str], DriftSums] = {}

    def __call__(self, tape: ForwardTape) -> None:
        """Add one forward pass."""
        if self.training_only and not tape.training:
            return
        for key, sums in tape.sums.items():
            sums = sums.detach().total()
            self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        for key, drift in tape.drift.items():
            # Batches have other sequences, so only their sum is kept.
            drift = DriftSums(drift.divergence.sum(), drift.before, drift.after, drift.tokens.sum()).detach()
            self._drift[key] = self._drift[key] + drift if key in self._drift else drift
        for adapter in dict.fromkeys(name for name, _ in tape.sums):  # the same order on every process
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

    def drift(self, adapter: str = "default") -> dict[str, dict[str, float]]:
        """How far a tuned base router has moved, per experts module; empty where it is frozen or nothing was seen.

        Returns:
            ``divergence``: Kullback-Leibler divergence of its probabilities from the old ones, nats per token.
            ``load_drift``: share of the probability mass that has changed experts (total variation), 0 to 1.
        """
        result = {}
        for (name, layer), sums in self._drift.items():
            if name != adapter:
                continue
            divergence, tokens = sum_over_processes(torch.stack([sums.divergence, sums.tokens])).tolist()
            before, after = (sum_over_processes(mass) for mass in (sums.before, sums.after))
            moved = (after - before).abs().sum().item() / 2
            result[layer] = {"divergence": divergence / max(tokens, 1), "load_drift": moved / max(tokens, 1)}
        return result

    def adapters(self) -> list[str]:
        """Adapters whose routers, or whose base router, were seen."""
        return list(dict.fromkeys([*self._passes, *(name for name, _ in self._drift)]))

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums, self._passes, self._drift = {}, {}, {}


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
    share of one expert in any layer) and ``router_load_entropy`` (mean over layers, 1 is perfect balance); for a tuned base
    router ``base_router_divergence`` (mean over layers, nats) and ``base_router_load_drift`` (largest of any layer). Put it first
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
            values = self.load.losses(adapter)
            if shares:
                entropies = [_entropy(share) for share in shares]
                values["router_load_max"] = max(max(share) for share in shares)
                values["router_load_entropy"] = sum(entropies) / len(entropies)
            drift = self.load.drift(adapter).values()
            if drift:
                values["base_router_divergence"] = sum(layer["divergence"] for layer in drift) / len(drift)
                values["base_router_load_drift"] = max(layer["load_drift"] for layer in drift)
            values = {f"{key}{suffix}": value for key, value in values.items()}
            logs.update(values)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(values)
        self.load.reset()


def _entropy(share: list[float]) -> float:
    if len(share) == 1:
        return 1.0
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))
