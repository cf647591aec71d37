"""What one forward pass leaves behind for the router's auxiliary losses, and how their gradient reaches the router.

The auxiliary gradient is injected by two autograd nodes that leave every value unchanged. One sits on the loss (or on
TRL's ``log_probs``): its backward runs before any block's and reads off with which weight this micro-batch enters the
step, so gradient accumulation, token averaging over processes, loss scaling and any factor the trainer applies are
already in it. The other sits on each router's logits: its backward adds the auxiliary gradient times that weight. In a
layer under ``torch.compile``, where a node cannot talk to Python, the sums keep their graph and ``objective -
objective.detach()`` is added to the loss instead; a model compiled in parts may do both. (Compiling with gradient
checkpointing, the record inside a checkpointed layer breaks the graph there unless
``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`` is set; the gradient is right either way.)

The load-balance loss pools all layers, and its load factors are only known when the forward is over; they are constants
of the gradient, so each layer's share is computed in its own backward, also when gradient checkpointing recomputes it.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.ops.routing import RouterSums, load_balance_loss, router_sums, router_z_loss


@dataclass(frozen=True)
class RouterCoefficients:
    """Weights of the auxiliary losses of one adapter's routers."""

    load_balance: float = 0.0
    z: float = 0.0

    def __bool__(self) -> bool:
        return self.load_balance != 0 or self.z != 0

    def objective(self, pooled: RouterSums, local: RouterSums | None = None) -> Tensor:
        """The weighted auxiliary loss; with ``local``, the part of it that one layer's probabilities contribute."""
        part = pooled if local is None else local
        return self.load_balance * load_balance_loss(
            pooled.counts.to(part.counts.device), part.probabilities, pooled.tokens.to(part.tokens.device)
        ) + self.z * router_z_loss(part.squared_lse, pooled.tokens.to(part.tokens.device))


@dataclass
class ForwardTape:
    """One forward pass: which tokens count, what each router did, and with which weight the pass enters the step.

    Attributes:
        num_tokens: rows times length of the model's input.
        mask: [batch * tokens] True where a token is not padding; None when all count.
        row_adapters: adapter name per row (mixed batches), else None.
        training: auxiliary gradients are wanted.
        sums: (adapter, layer) -> that router's sums.
        coefficients: adapter -> its weights.
        weights: source of the loss -> gradient-weight of this micro-batch, known once backward has begun.
    """

    num_tokens: int
    mask: Tensor | None = None
    row_adapters: list[str] | None = None
    training: bool = False
    sums: dict[tuple[str, str], RouterSums] = field(default_factory=dict)
    coefficients: dict[str, RouterCoefficients] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    _pooled: dict[str, RouterSums] = field(default_factory=dict)

    def pooled(self, adapter: str) -> RouterSums:
        """The adapter's sums over all layers; every layer's backward asks for them."""
        if adapter not in self._pooled:
            parts = [sums for (name, _), sums in self.sums.items() if name == adapter]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            self._pooled[adapter] = total
        return self._pooled[adapter]

    def token_mask(self, logits: Tensor) -> Tensor | None:
        """[tokens] True where a token counts; None counts all, which is all we can do where experts see a part of them."""
        if self.mask is None:
            return None
        if self.mask.shape[0] != logits.shape[0]:
            warnings.warn(
                "PERFT: the experts of this model receive other tokens than its input has, so the auxiliary loss cannot "
                "leave out padding; it counts every token that was routed",
                stacklevel=2,
            )
            return None
        return self.mask.to(logits.device)

    def add_router(
        self, adapter: str, layer: str, logits: Tensor, index: Tensor, coefficients: RouterCoefficients
    ) -> None:
        """Record what one layer's router did in this pass."""
        mask = self.token_mask(logits)
        if not torch.compiler.is_compiling():
            # Only the compiled path differentiates these sums; a graph left here would also be one that gradient
            # checkpointing does not see again.
            logits = logits.detach()
        self.sums[adapter, layer] = router_sums(logits, index, mask)
        self.coefficients[adapter] = coefficients
        self._pooled.pop(adapter, None)

    def router_gradient(self, adapter: str, logits: Tensor, index: Tensor) -> Tensor | None:
        """Auxiliary gradient [tokens, num_experts] of one layer's logits; None where no loss has passed by."""
        if not self.weights:
            warn_no_weight()
            return None
        mask = self.token_mask(logits)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            objective = self.coefficients[adapter].objective(self.pooled(adapter), router_sums(leaf, index, mask))
            (gradient,) = torch.autograd.grad(objective, leaf)
        weight = torch.stack([w.to(gradient.device) for w in self.weights.values()]).sum()
        return gradient * weight.to(gradient.dtype)

    def by_mechanism(self) -> tuple[bool, bool]:
        """Whether some routers of this pass carry their gradient in their sums (compiled), and some in nodes (eager)."""
        wanted = [sums for (name, _), sums in self.sums.items() if self.coefficients[name]]
        carried = [sums.probabilities.requires_grad for sums in wanted]
        return any(carried), not all(carried)

    def objective(self) -> Tensor:
        """The weighted auxiliary loss of all adapters in this pass."""
        terms = [coefficients.objective(self.pooled(adapter)) for adapter, coefficients in self.coefficients.items()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()


class _RouterAnchor(torch.autograd.Function):
    """Identity on a router's logits; backward adds the auxiliary gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, tape: ForwardTape, adapter: str) -> Tensor:
        ctx.save_for_backward(logits, index)
        ctx.tape, ctx.adapter = tape, adapter
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        auxiliary = ctx.tape.router_gradient(ctx.adapter, *ctx.saved_tensors)
        gradient = gradients[0]
        return gradient if auxiliary is None else gradient + auxiliary, None, None, None


class _LossAnchor(torch.autograd.Function):
    """Identity on the loss; backward tells the tape with which weight the micro-batch enters the step."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Tensor, owner: Any, tape: ForwardTape, source: str) -> Tensor:
        ctx.save_for_backward(share)
        ctx.owner, ctx.tape, ctx.source = owner, tape, source
        return value.clone()  # not a view: the Trainer multiplies the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (share,) = ctx.saved_tensors
        ctx.tape.weights[ctx.source] = (gradients[0] * share).sum().detach()
        # A block that gradient checkpointing recomputes now belongs to this pass.
        ctx.owner.begin_backward(ctx.tape)
        return gradients[0], None, None, None, None


def anchor_router(logits: Tensor, index: Tensor, tape: ForwardTape, adapter: str) -> Tensor:
    """Let the auxiliary gradient of ``tape`` reach these logits [tokens, num_experts]."""
    return _RouterAnchor.apply(logits, index, tape, adapter)


def anchor_loss(value: Tensor, share: Tensor, owner: Any, tape: ForwardTape, source: str) -> Tensor:
    """Let ``tape`` learn its weight from the gradient of ``value``.

    Args:
        value: the loss [] or the log-probabilities [batch, tokens].
        share: what turns the gradient of ``value`` into the weight by multiplying and summing.
        owner: told when the backward begins, by ``begin_backward``.
        tape: the pass.
        source: name of the value, so that a second backward replaces its own weight only.
    """
    return _LossAnchor.apply(value, share, owner, tape, source)


def warn_no_weight() -> None:
    """Say that a router is training without its auxiliary loss; Python shows the same warning once."""
    warnings.warn(
        "PERFT: the adapter router's auxiliary loss (router_aux_loss_coef, router_z_loss_coef) is NOT applied: the "
        "gradient did not come through `outputs.loss` or `outputs.log_probs`, so its weight in the step is unknown "
        "(custom loss function, label smoothing, preference trainers). Train on outputs.loss, or set both coefficients "
        "to 0 to say that you mean it",
        stacklevel=2,
    )
