"""Muon for the hidden matrices of a µP model, AdamW for everything else, as one optimizer.

``torch.optim.Muon`` takes matrices only. Stacked experts [num_experts, fan_out, fan_in] are no matrix to it, so they go to
AdamW on the Adam column, with embedding, head, routers, gains and biases; Muon gets what is hidden by ``mup.roles`` and has
two dimensions: q, k, v, o, a DCCA block's descend and ascend where the latent grows, a shared expert.

One optimizer, because a Trainer, schedulers, accelerate and checkpoints know of one: one list of groups, one state.

Under FSDP2 whole matrices are made orthogonal, gathered for it. torch does that in bfloat16 and blows up directions of
which the gradient has next to nothing, so a split run follows a whole one only to some percent of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from hf_moe_ext.mup.groups import DEFAULT_EPS, DecayPolicy, check_numbers, gather_groups
from hf_moe_ext.mup.guard import leave_alone
from hf_moe_ext.mup.roles import assign_roles
from hf_moe_ext.mup.rules import HIDDEN
from hf_moe_ext.mup.spectral import ADJUSTMENTS, MATCH_RMS_ADAMW, muon_factors

_MUON, _ADAM = "muon", "adam"
_MUON_EPS = 1e-7  # torch's
_MUON_OPTIONS = ("momentum", "nesterov", "ns_coefficients", "ns_steps")


def muon_groups(
    model: nn.Module,
    lr: float,
    adam_lr: float | None = None,
    weight_decay: float = 0.0,
    eps: float = DEFAULT_EPS,
    *,
    adjust_lr_fn: str | None = None,
    independent_weight_decay: bool = True,
    decay_embeddings: bool = True,
    decay_routers: bool = True,
) -> list[dict[str, Any]]:
    """Groups for ``MuonWithAdamW``, as those of ``param_groups``; each says under ``rule`` which of the two it is for.

    Args:
        model: a µP model, bare or wrapped; only what requires a gradient is taken.
        lr: Muon's, tuned at the base width.
        adam_lr: AdamW's, tuned at the base width. None: ``lr``, which only "match_rms_adamw" allows.
        weight_decay: at the base width, of both. Gains and biases have none.
        eps: Adam's at the base width.
        adjust_lr_fn: of ``torch.optim.Muon``: "original" (also None) or "match_rms_adamw".
        independent_weight_decay: see ``param_groups``.
        decay_embeddings: see ``param_groups``.
        decay_routers: see ``param_groups``.

    Raises:
        ValueError: a negative number, an unknown adjustment, no ``adam_lr``, no hidden matrix to train, or a parameter
            without declared axes.
    """
    if adjust_lr_fn not in ADJUSTMENTS:
        names = ", ".join(repr(name) for name in ADJUSTMENTS if name)
        raise ValueError(f"adjust_lr_fn must be one of {names}, got {adjust_lr_fn!r}")
    if adam_lr is None:
        if adjust_lr_fn != MATCH_RMS_ADAMW:
            raise ValueError(
                "Muon with adjust_lr_fn='original' and AdamW have learning rates of different size: give adam_lr too, or "
                "write adjust_lr_fn='match_rms_adamw', under which one lr serves both"
            )
        adam_lr = lr
    check_numbers(lr=lr, adam_lr=adam_lr, weight_decay=weight_decay, eps=eps)
    roles, parameters = assign_roles(model), dict(model.named_parameters())
    # The number of dimensions is torch's limit; that it is hidden is its role. What is only added to a matrix is none:
    # the values of a sparse delta lie in two dimensions [experts, kept] that no map has.
    matrices = [
        name
        for name, role in roles.items()
        if role.role == HIDDEN and parameters[name].ndim == 2 and role.axes.adapts is None
    ]
    if not matrices:
        raise ValueError(
            "Muon: no hidden matrix of this model requires a gradient (with mup='none' nothing is hidden, nor is an "
            "adapter); write mup='mup' and train the model itself, or use AdamW"
        )
    policy = DecayPolicy(independent_weight_decay, decay_embeddings, decay_routers)
    muon = {
        name: policy.apply(roles[name], muon_factors(roles[name], parameters[name].shape, adjust_lr_fn))
        for name in matrices
    }
    adam = {name: policy.apply(role, role.update_factors("adam")) for name, role in roles.items() if name not in muon}
    groups = [
        group | {"rule": _MUON, "adjust_lr_fn": adjust_lr_fn}
        for group in gather_groups(parameters, muon, lr, weight_decay, _MUON_EPS)
    ]
    groups += [group | {"rule": _ADAM} for group in gather_groups(parameters, adam, adam_lr, weight_decay, eps)]
    return sorted(groups, key=lambda group: group["lr"] != lr)


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` on the groups with ``rule="muon"``, ``torch.optim.AdamW`` on those with ``rule="adam"``."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        """Take groups as ``muon_groups`` makes them.

        Args:
            params: the groups.
            lr: base rate; schedules with a floor divide by it.
            **options: ``momentum``, ``nesterov``, ``ns_coefficients``, ``ns_steps`` for Muon, the rest (``betas``, ``fused``
                ...) for AdamW.

        Raises:
            ValueError: see ``add_param_group``.
            TypeError: an option that neither has.
        """
        muon = {name: options.pop(name) for name in _MUON_OPTIONS if name in options}
        self._defaults_of = {
            _MUON: Muon([torch.zeros(1, 1)], lr=lr, **muon).defaults,
            _ADAM: AdamW([torch.zeros(1)], lr=lr, **options).defaults,
        }
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with a ``rule``.

        Raises:
            ValueError: no rule, or a tensor for Muon that is no matrix.
        """
        rule = param_group.get("rule")
        if rule not in self._defaults_of:
            raise ValueError(f"MuonWithAdamW: a group needs rule='muon' or rule='adam', got {rule!r}; see muon_groups")
        super().add_param_group({**self._defaults_of[rule], **param_group})
        shapes = [tuple(p.shape) for p in self.param_groups[-1]["params"] if p.ndim != 2]
        if rule == _MUON and shapes:
            self.param_groups.pop()
            raise ValueError(
                f"MuonWithAdamW: Muon takes matrices only, got a tensor of shape {shapes[0]}; write rule='adam'"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, part in self._parts().items():
            # Anew each time: loading a checkpoint exchanges both lists.
            part.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            part.state = self.state
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_defaults_of": self._defaults_of}

    def _parts(self) -> dict[str, Optimizer]:
        """The two optimizers; every setting is in the groups that they are handed."""
        if not hasattr(self, "_both"):
            self._both: dict[str, Optimizer] = {_MUON: Muon([torch.zeros(1, 1)]), _ADAM: AdamW([torch.zeros(1)])}
            for part in self._both.values():
                leave_alone(part)
        return self._both
