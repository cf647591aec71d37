"""What one forward pass leaves behind for the router's auxiliary losses, and how their gradient reaches the router.

The auxiliary gradient is injected by two autograd nodes that leave every value unchanged. One sits on the loss (or on
TRL's ``log_probs``): its backward runs before any block's and reads off with which weight each sequence of this
micro-batch enters the step, so gradient accumulation, token averaging over processes, loss scaling and any factor the
trainer applies are already in it. The other sits on each router's logits: its backward adds the auxiliary gradient times
those weights. In a layer under ``torch.compile``, where a node cannot talk to Python, the sums keep their graph and
``objective - objective.detach()`` is added to the loss instead; a model compiled in parts may do both. (Compiling with
gradient checkpointing, the record inside a checkpointed layer breaks the graph there unless
``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`` is set; the gradient is right either way.)

The load factors of the "batch" scope pool all layers and are only known when the forward is over; load factors are
constants of the gradient in every scope, so each layer's share is computed in its own backward, also when gradient
checkpointing recomputes it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_moe_ext.ops.routing import (
    DriftSums,
    RouterSums,
    TokenGroups,
    load_balance_loss,
    router_losses_gradient,
    router_z_loss,
)
from hf_moe_ext.perft.batch import LossShare

Scope = Literal["batch", "sequence", "global"]


@dataclass(frozen=True)
class RouterCoefficients:
    """Weights of the auxiliary losses of one adapter's routers, and over which tokens their load is taken.

    ``drift`` weighs how far the base model's own router has moved, per sequence and layer; it is true of no adapter router.

    Scopes:
        "batch": all tokens of the micro-batch and all layers pooled, as the paper's code does.
        "sequence": each sequence and each layer by itself, then averaged; whatever the batches, the same gradient.
        "global": the load of each layer in the whole previous step; linear in the tokens, so also independent of batches.
    """

    load_balance: float = 0.0
    z: float = 0.0
    scope: Scope = "sequence"
    drift: float = 0.0

    def __bool__(self) -> bool:
        return self.load_balance != 0 or self.z != 0


@dataclass
class RouterRecord:
    """What the routers of one layer did in the pass under way, and their load in the step before; by adapter name.

    A layer writes into its own record only: under ``torch.compile`` one that all layers share would be a guard that
    every layer fails anew.

    Attributes:
        sums: of the pass under way.
        drift: of the base model's router, in the pass under way.
        load: [num_experts + 1] tokens per expert, then tokens, summed over the step under way ("global" only).
        last_load: [num_experts] share of the tokens per expert in the step before ("global" only).
    """

    sums: dict[str, RouterSums] = field(default_factory=dict)
    drift: dict[str, DriftSums] = field(default_factory=dict)
    load: dict[str, Tensor] = field(default_factory=dict)
    last_load: dict[str, Tensor] = field(default_factory=dict)

    def forget(self, adapter: str) -> None:
        """Drop everything about one adapter."""
        for held in (self.sums, self.drift, self.load, self.last_load):
            held.pop(adapter, None)


@dataclass
class ForwardTape:
    """One forward pass: which tokens count, what each router did, and with which weight the pass enters the step.

    Attributes:
        sequences: the sequences of the model's input and which of its tokens count.
        num_tokens: rows times length of the input.
        row_adapters: adapter name per row (mixed batches), else None.
        training: auxiliary gradients are wanted.
        sums: (adapter, layer) -> that router's sums, known when the forward is over.
        drift: (adapter, layer) -> how far the base model's router has moved.
        last_load: (adapter, layer) -> its load in the step before, for the scope "global".
        coefficients: adapter -> its weights.
        weights: source of the loss -> [sequences] gradient-weight of each, known once backward has begun.
    """

    sequences: TokenGroups = TokenGroups()  # noqa: RUF009 - immutable
    num_tokens: int = 0
    row_adapters: list[str] | None = None
    training: bool = False
    sums: dict[tuple[str, str], RouterSums] = field(default_factory=dict)
    drift: dict[tuple[str, str], DriftSums] = field(default_factory=dict)
    last_load: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    coefficients: dict[str, RouterCoefficients] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    _pooled: dict[str, RouterSums] = field(default_factory=dict)

    def pooled(self, adapter: str) -> RouterSums:
        """The adapter's sums over all layers and groups, as one group; every layer's backward asks for them."""
        if adapter not in self._pooled:
            parts = self._parts(adapter)
            total = parts[0].total()
            for part in parts[1:]:
                total = total + part.total()
            self._pooled[adapter] = total.detach()
        return self._pooled[adapter]

    def _parts(self, adapter: str) -> list[RouterSums]:
        return [sums for (name, _), sums in self.sums.items() if name == adapter]

    def groups(self, scope: Scope, rows: int) -> TokenGroups:
        """The token groups of a scope, for a router that sees this many rows."""
        sequences = self.sequences
        if rows != self.num_tokens:
            if scope == "batch" and sequences.mask is None:
                return TokenGroups()
            warnings.warn(
                "PERFT: the experts of this model receive other tokens than its input has, so the auxiliary loss can "
                "neither leave out padding nor tell sequences apart; it counts every token that was routed",
                stacklevel=2,
            )
            return TokenGroups()
        return TokenGroups(1, sequences.mask) if scope == "batch" else sequences

    def router_gradient(self, adapter: str, layer: str, logits: Tensor) -> Tensor | None:
        """Auxiliary gradient [tokens, num_experts] of one layer's logits; None where no loss has passed by."""
        if not self.weights:
            warn_no_weight()
            return None
        coefficients = self.coefficients[adapter]
        groups = self.groups(coefficients.scope, logits.shape[0])
        counts, tokens, layers = (value.to(logits.device) for value in self.load(adapter, layer))
        weights = self.group_weights(groups.num_groups, logits) / layers
        return router_losses_gradient(
            logits, counts, tokens, coefficients.load_balance * weights, coefficients.z * weights, groups
        )

    def group_weights(self, num_groups: int, like: Tensor) -> Tensor:
        """[num_groups] the weight of each group in the step, on the device and in the dtype of ``like``."""
        weights = torch.stack([w.to(like.device) for w in self.weights.values()]).sum(dim=0).to(like.dtype)
        return weights if len(weights) == num_groups else weights.sum(dim=0, keepdim=True)

    def load(self, adapter: str, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the probabilities of one layer's router are weighed against, by the adapter's scope.

        Returns:
            counts: [groups, num_experts] tokens per expert.
            tokens: [groups] what they and the summed probabilities are divided by.
            layers: [] number of layers whose objectives are averaged.
        """
        scope, sums = self.coefficients[adapter].scope, self.sums[adapter, layer]
        if scope == "batch":
            pooled = self.pooled(adapter)
            return pooled.counts, pooled.tokens, torch.ones_like(pooled.tokens[0])
        counts, layers = sums.counts, torch.full_like(sums.tokens[0], len(self._parts(adapter)))
        if scope == "global":
            last = self.last_load.get((adapter, layer))
            # Before the first step every expert counts as loaded alike, which asks for nothing.
            counts = sums.tokens[:, None] * (1.0 / counts.shape[1] if last is None else last.to(counts))
        return counts, sums.tokens, layers

    def drift_gradient(self, adapter: str, difference: Tensor, sums: Callable[[Tensor], DriftSums]) -> Tensor | None:
        """Gradient of the drift at a base router's difference; None where no loss has passed by."""
        if not self.weights:
            warn_no_weight()
            return None
        with torch.enable_grad():
            leaf = difference.detach().requires_grad_()
            terms = self.drift_objective(adapter, sums(leaf))
            (gradient,) = torch.autograd.grad(terms, leaf, self.group_weights(len(terms), terms))
        return gradient

    def drift_objective(self, adapter: str, sums: DriftSums) -> Tensor:
        """[sequences] what one layer's base router contributes to the weighted drift."""
        layers = sum(name == adapter for name, _ in self.drift)
        return self.coefficients[adapter].drift * (sums.divergence / sums.tokens.clamp(min=1)) / layers

    def layer_objective(self, adapter: str, layer: str) -> Tensor:
        """[groups] what one layer's router contributes to the weighted auxiliary loss; layers add up to it."""
        sums, coefficients = self.sums[adapter, layer], self.coefficients[adapter]
        counts, tokens, layers = (value.to(sums.tokens.device) for value in self.load(adapter, layer))
        balance = load_balance_loss(counts, sums.probabilities, tokens)
        return (coefficients.load_balance * balance + coefficients.z * router_z_loss(sums.squared_lse, tokens)) / layers

    def by_mechanism(self) -> tuple[bool, bool]:
        """Whether some routers of this pass carry their gradient in their sums (compiled), and some in nodes (eager)."""
        carried = [s.probabilities.requires_grad for (name, _), s in self.sums.items() if self.coefficients[name]]
        carried += [s.divergence.requires_grad for (name, _), s in self.drift.items() if self.coefficients[name].drift]
        return any(carried), not all(carried)

    def objective(self) -> Tensor:
        """[sequences] the weighted auxiliary loss of all adapters in this pass; the same for all in the scope "batch"."""
        terms = [self.layer_objective(adapter, layer) for adapter, layer in self.sums]
        terms += [self.drift_objective(adapter, sums) for (adapter, _), sums in self.drift.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term.to(total.device)
        return total.expand(self.sequences.num_groups)


class _RouterAnchor(torch.autograd.Function):
    """Identity on a router's logits; backward adds the auxiliary gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tape: ForwardTape, adapter: str, layer: str) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.tape, ctx.adapter, ctx.layer = tape, adapter, layer
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        auxiliary = ctx.tape.router_gradient(ctx.adapter, ctx.layer, *ctx.saved_tensors)
        gradient = gradients[0]
        return gradient if auxiliary is None else gradient + auxiliary, None, None, None


class _LossAnchor(torch.autograd.Function):
    """Identity on the loss; backward tells the tape with which weight the micro-batch enters the step."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: LossShare, owner: Any, tape: ForwardTape, source: str) -> Tensor:
        ctx.share, ctx.owner, ctx.tape, ctx.source = share, owner, tape, source
        return value.clone()  # not a view: the Trainer multiplies the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tape.weights[ctx.source] = ctx.share.weights(gradients[0].detach())
        # A block that gradient checkpointing recomputes now belongs to this pass.
        ctx.owner.begin_backward(ctx.tape)
        return gradients[0], None, None, None, None


def anchor_router(logits: Tensor, tape: ForwardTape, adapter: str, layer: str) -> Tensor:
    """Let the auxiliary gradient of ``tape`` reach these logits [tokens, num_experts]."""
    return _RouterAnchor.apply(logits, tape, adapter, layer)


def anchor_loss(value: Tensor, share: LossShare, owner: Any, tape: ForwardTape, source: str) -> Tensor:
    """Let ``tape`` learn its weights from the gradient of ``value``.

    Args:
        value: the loss [] or the log-probabilities [batch, tokens].
        share: what turns the gradient of ``value`` into the weight of each sequence.
        owner: told when the backward begins, by ``begin_backward``.
        tape: the pass.
        source: name of the value, so that a second backward replaces its own weight only.
    """
    return _LossAnchor.apply(value, share, owner, tape, source)


def warn_no_weight() -> None:
    """Say that a router is training without its auxiliary loss; Python shows the same warning once."""
    warnings.warn(
        "PERFT: the routers' auxiliary loss (router_aux_loss_coef, router_z_loss_coef, base_router_drift_coef) is NOT applied: the "
        "gradient did not come through `outputs.loss` or `outputs.log_probs`, so its weight in the step is unknown "
        "(custom loss function, label smoothing, preference trainers). Train on outputs.loss, or set the coefficients "
        "to 0 to say that you mean it",
        stacklevel=2,
    )
