"""Says so when a µP model is trained with learning rates that are not µP's.

A model cannot see its optimizer, and the Trainer makes stock groups wherever it is not told otherwise, also when it makes an
optimizer a second time. torch lets anyone look at optimizers before they step (``register_optimizer_step_pre_hook``); that
is done here from the first µP model on. It reads learning rates, warns once per optimizer, and changes nothing.
"""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.utils import logging

from hf_moe_ext.mup.roles import NONE, assign_roles
from hf_moe_ext.mup.rules import Optimiser

logger = logging.get_logger(__name__)

_TOLERANCE = 1e-6  # what rounding leaves between two quotients
_watched: WeakSet[nn.Module] = WeakSet()
# Optimizer -> learning rate factor of each group that holds parameters of a µP model; None once nothing is left to say.
_known: WeakKeyDictionary[Optimizer, list[float | None] | None] = WeakKeyDictionary()
_hooked = False


def watch(model: nn.Module) -> None:
    """Warn at the first step of an optimizer that gives this model's parameters other learning rates than µP's."""
    global _hooked
    if model.config.mup == NONE:  # type: ignore[union-attr]
        return
    _watched.add(model)
    if not _hooked:
        register_optimizer_step_pre_hook(_look)
        _hooked = True


def _look(optimizer: Optimizer, _: Any, __: Any) -> None:
    if optimizer not in _known:
        _known[optimizer] = _read_factors(optimizer)
    factors = _known[optimizer]
    if factors is None:
        return
    rates = [
        group["lr"] / factor
        for group, factor in zip(optimizer.param_groups, factors, strict=False)
        if factor is not None
    ]
    if max(rates) - min(rates) > _TOLERANCE * max(rates):
        _known[optimizer] = None
        logger.warning(
            f"{type(optimizer).__name__}: its schedule has changed the ratios between the learning rates of its groups, which "
            "µP needs as they are; use a schedule that multiplies them all (cosine, linear, WSD), without an absolute floor"
        )


def _read_factors(optimizer: Optimizer) -> list[float | None] | None:
    """The factor of each group, if they are µP's; else warn."""
    rule: Optimiser = "sgd" if isinstance(optimizer, SGD) else "adam"
    expected = {}
    for model in _watched:
        roles = assign_roles(model)
        for name, parameter in model.named_parameters():
            if name in roles and not any(part in name for part in (".lora_", ".perft_")):
                expected[id(parameter)] = (name, roles[name].update_factors(rule)[0])
    found: list[float | None] = []
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        known = [expected[id(p)] for p in group["params"] if id(p) in expected]
        rate = group.get("initial_lr", group["lr"])
        rates |= {name: float(rate) / factor for name, factor in known}
        found.append(known[0][1] if known else None)
    if not rates:
        return None
    least, greatest = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    if rates[greatest] - rates[least] > _TOLERANCE * rates[greatest]:
        logger.warning(
            f"{type(optimizer).__name__} gives the parameters of a µP model learning rates that are not µP's: at its base "
            f"width the model would train {greatest} with {rates[greatest]:.3g} and {least} with {rates[least]:.3g}. Write "
            "Trainer(..., optimizer_cls_and_kwargs=hf_moe_ext.mup.trainer_optimizer(model, args=args)), or "
            "AdamW(hf_moe_ext.mup.param_groups(model, lr)) in a loop of your own"
        )
        return None
    return found
