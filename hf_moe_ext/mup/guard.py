"""Says so when a µP model is trained with learning rates that are not µP's.

A model cannot see its optimizer, and the Trainer makes stock groups wherever it is not told otherwise, also when it makes an
optimizer a second time. torch lets anyone look at optimizers before they step (``register_optimizer_step_pre_hook``); that
is done here from the first µP model on. It reads learning rates, warns once per optimizer, and changes nothing.
"""

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import SGD, Muon, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.utils import logging

from hf_moe_ext.mup.roles import NONE, TensorRole, read_role
from hf_moe_ext.mup.rules import HIDDEN, Optimiser
from hf_moe_ext.mup.spectral import muon_factors

logger = logging.get_logger(__name__)

_TOLERANCE = 1e-6  # what rounding leaves between two quotients
_watched: WeakSet[nn.Module] = WeakSet()
# Of a group that holds parameters of a µP model: rule and learning rate factor. Rates of two rules are not compared.
_Factor = tuple[Optimiser, float]
# Optimizer -> how many parameters it had, and what its groups are; None once nothing is left to say.
_known: WeakKeyDictionary[Optimizer, tuple[int, list[_Factor | None]] | None] = WeakKeyDictionary()
_hooked = False


def watch(model: nn.Module) -> None:
    """Warn at the first step of an optimizer that gives this model's parameters other learning rates than µP's."""
    global _hooked
    if getattr(getattr(model, "config", None), "mup", NONE) == NONE:
        return
    _watched.add(model)
    if not _hooked:
        register_optimizer_step_pre_hook(_look)
        _hooked = True


def leave_alone(optimizer: Optimizer) -> None:
    """Never warn about this one: it is part of another, which is looked at."""
    _known[optimizer] = None


def _look(optimizer: Optimizer, _: Any, __: Any) -> None:
    if optimizer in _known and _known[optimizer] is None:
        return
    count, known = sum(len(group["params"]) for group in optimizer.param_groups), _known.get(optimizer)
    if known is None or known[0] != count:  # groups may be added
        factors = _read_factors(optimizer)
        known = _known[optimizer] = None if factors is None else (count, factors)
    if known is None:
        return
    rates: dict[Optimiser, list[float]] = {}
    for group, found in zip(optimizer.param_groups, known[1], strict=True):
        if found is not None and group["lr"]:
            rates.setdefault(found[0], []).append(group["lr"] / found[1])
    if any(max(each) - min(each) > _TOLERANCE * max(each) for each in rates.values()):
        _known[optimizer] = None
        logger.warning(
            f"{type(optimizer).__name__}: its schedule has changed the ratios between the learning rates of its groups, which "
            "µP needs as they are; use a schedule that multiplies them all (cosine, linear, WSD), without an absolute floor"
        )


def _read_factors(optimizer: Optimizer) -> list[_Factor | None] | None:
    """Rule and factor of each group, if they are µP's; else warn."""
    expected = _find_roles({id(p) for group in optimizer.param_groups for p in group["params"]})
    found: list[_Factor | None] = []
    rates: dict[Optimiser, dict[str, float]] = {}
    for group in optimizer.param_groups:
        rule = _read_rule(optimizer, group)
        known = [(*expected[id(p)], p) for p in group["params"] if id(p) in expected]
        other = next((name for name, role, _ in known if rule == "muon" and role.role != HIDDEN), None)
        if other is not None:
            _warn(f"{type(optimizer).__name__} trains {other} of a µP model, and Muon is for its hidden matrices only")
            return None
        factors = [(name, _read_lr_factor(role, p, rule, group)) for name, role, p in known]
        rate = group.get("initial_lr", group["lr"])
        if not factors or not rate:  # of somebody else, or chosen by the optimizer, or held still
            found.append(None)
            continue
        rates.setdefault(rule, {}).update({name: float(rate) / factor for name, factor in factors})
        found.append((rule, factors[0][1]))
    for each in rates.values():
        if not each:
            continue
        least, greatest = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
        if each[greatest] - each[least] > _TOLERANCE * each[greatest]:
            _warn(
                f"{type(optimizer).__name__} gives the parameters of a µP model learning rates that are not µP's: at its base "
                f"width the model would train {greatest} with {each[greatest]:.3g} and {least} with {each[least]:.3g}"
            )
            return None
    return found if any(rates.values()) else None


def _find_roles(wanted: set[int]) -> dict[int, tuple[str, TensorRole]]:
    """Of the µP models' own parameters among these, by identity; adapters and what has no role are nobody's business here."""
    found: dict[int, tuple[str, TensorRole]] = {}
    # A model is watched beside the one it is part of; the longest name says most.
    for model in sorted(_watched, key=lambda model: hasattr(model, "lm_head")):
        for name, parameter in model.named_parameters():
            if id(parameter) in wanted and not any(part in name for part in (".lora_", ".perft_")):
                with suppress(ValueError):
                    found[id(parameter)] = (name, read_role(name, model.config))
    return found


def _read_rule(optimizer: Optimizer, group: dict[str, Any]) -> Optimiser:
    """The group's own, where an optimizer has several."""
    of_class: Optimiser = "sgd" if isinstance(optimizer, SGD) else "muon" if isinstance(optimizer, Muon) else "adam"
    return group.get("rule", of_class)


def _read_lr_factor(role: TensorRole, parameter: nn.Parameter, rule: Optimiser, group: dict[str, Any]) -> float:
    if rule == "muon":
        return muon_factors(role, parameter.shape, group["adjust_lr_fn"])[0]
    return role.update_factors(rule)[0]


def _warn(finding: str) -> None:
    logger.warning(
        f"{finding}. Write Trainer(..., optimizer_cls_and_kwargs=hf_moe_ext.mup.trainer_optimizer(model, args=args)), or "
        "AdamW(hf_moe_ext.mup.param_groups(model, lr)) in a loop of your own"
    )
