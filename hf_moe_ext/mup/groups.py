"""Optimizer groups of a µP model, and what hands them to the Trainer."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from hf_moe_ext.host import axes as host_axes
from hf_moe_ext.mup.roles import TensorRole, assign_roles
from hf_moe_ext.mup.rules import OPTIMISERS, Optimiser

# Adam's update does not change when the gradient is multiplied by a number; that is what its column of the table is for.
_RULE_OF: dict[type[Optimizer], Optimiser] = {AdamW: "adam", Adam: "adam", NAdam: "adam", RAdam: "adam", SGD: "sgd"}
_DEFAULT_EPS = 1e-8
# Of `TrainingArguments.lr_scheduler_type`: those that hold a floor in units of a learning rate, the same for every group.
_ABSOLUTE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class _Setting:
    """What makes two parameters share a group."""

    lr_factor: float
    decay_factor: float
    eps_factor: float


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = _DEFAULT_EPS,
    *,
    rule: Optimiser = "adam",
    independent_weight_decay: bool = True,
    decay_embeddings: bool = True,
    decay_routers: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: one per distinct setting, and per device mesh, in an order that only the model decides.

    The first group has the learning rate ``lr`` itself where any has, so that what a Trainer logs is ``lr``. Each group has
    a ``lr_factor`` beside what the optimizer reads: its learning rate over ``lr``.

    Args:
        model: a model whose configuration has the µP keys, bare or wrapped; only what requires a gradient is taken.
        lr: learning rate, tuned at the base width.
        weight_decay: at the base width. Gains and biases have none.
        eps: Adam's epsilon at the base width; divided where gradients shrink with the width.
        rule: "adam" for Adam, AdamW and their kin, "sgd" for SGD.
        independent_weight_decay: each step takes the same share of a weight at every width (arXiv 2510.19093 finds that this
            is what makes transfer last). False: one coefficient for all, which Adam multiplies by the group's own rate.
        decay_embeddings: whether the embedding has weight decay.
        decay_routers: whether routers have.

    Raises:
        ValueError: a negative number, nothing to train, or a parameter without declared axes.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"param_groups: {name} must be a number of at least 0; got {value!r}")
    if rule not in OPTIMISERS:
        raise ValueError(f"param_groups: rule must be one of {', '.join(map(repr, OPTIMISERS))}; got {rule!r}")
    roles = assign_roles(model)
    if not roles:
        raise ValueError("param_groups: no parameter of this model requires a gradient")
    undecayed = {host_axes.VOCAB: not decay_embeddings, host_axes.EXPERTS: not decay_routers}
    grouped: dict[tuple[_Setting, Any], dict[str, nn.Parameter]] = defaultdict(dict)
    parameters = dict(model.named_parameters())
    for name, role in roles.items():
        lr_factor, decay_factor, eps_factor = role.update_factors(rule)
        if not independent_weight_decay:
            decay_factor = 1.0
        if role.axes.fan_in is None or _is_spared(role, undecayed):
            decay_factor = 0.0
        parameter: Any = parameters[name]
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        # One kernel call cannot take parameters of several meshes.
        grouped[_Setting(lr_factor, decay_factor, eps_factor), mesh][name] = parameter
    groups = [
        {
            "params": list(members.values()),
            "lr": lr * setting.lr_factor,
            "weight_decay": weight_decay * setting.decay_factor,
            **({"eps": eps * setting.eps_factor} if rule == "adam" else {}),
            "lr_factor": setting.lr_factor,
        }
        for (setting, _), members in grouped.items()
    ]
    return sorted(groups, key=lambda group: group["lr_factor"] != 1.0)


def _is_spared(role: TensorRole, undecayed: dict[str, bool]) -> bool:
    """Whether an embedding or a router is to have no weight decay; the head has the vocabulary as its output."""
    return (role.axes.fan_in == host_axes.VOCAB and undecayed[host_axes.VOCAB]) or (
        role.axes.fan_out == host_axes.EXPERTS and undecayed[host_axes.EXPERTS]
    )


def trainer_optimizer(
    model: nn.Module,
    optimizer_class: type[Optimizer] = AdamW,
    *,
    args: Any = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    eps: float | None = None,
    rule: Optimiser | None = None,
    independent_weight_decay: bool = True,
    decay_embeddings: bool = True,
    decay_routers: bool = True,
    **options: Any,
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, so that it builds its optimizer on the groups of ``param_groups``.

    Built when the Trainer asks, on the model it then has: under FSDP2, expert parallelism, a second training, or a search
    with ``model_init``. The Trainer passes none of its own settings on, so either give ``args`` or write the numbers here.
    What comes from ``args`` is read when the optimizer is built: a search changes them from trial to trial, and a number
    written here would hold for all of its trials.

    Args:
        model: a µP model; looked at now, so that mistakes come before training.
        optimizer_class: AdamW, Adam, NAdam, RAdam or SGD of torch; others with ``rule``.
        args: ``TrainingArguments``; their ``learning_rate``, ``weight_decay``, ``adam_epsilon`` and betas count where
            nothing else is given, and their schedule is checked.
        lr: at the base width.
        weight_decay: at the base width.
        eps: at the base width.
        rule: which column of the table an optimizer of another kind follows: "adam" if multiplying all gradients by a number
            does not change its update, "sgd" if the update is proportional to them.
        independent_weight_decay: see ``param_groups``.
        decay_embeddings: see ``param_groups``.
        decay_routers: see ``param_groups``.
        **options: for the optimizer (``betas``, ``momentum``, ``fused`` ...).

    Example:
        ``Trainer(model, args, ..., optimizer_cls_and_kwargs=trainer_optimizer(model, args=args))``

    Raises:
        ValueError: a schedule with an absolute floor, no learning rate, an unknown kind of optimizer.
    """
    rule = _choose_rule(optimizer_class, rule)
    written = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    numbers = {name: value for name, value in written.items() if value is not None}
    if args is None and lr is None:
        raise ValueError("trainer_optimizer: give lr, or args=TrainingArguments(learning_rate=...)")
    settings: dict[str, Any] = {
        "rule": rule,
        "independent_weight_decay": independent_weight_decay,
        "decay_embeddings": decay_embeddings,
        "decay_routers": decay_routers,
    }
    settings |= numbers
    if args is not None:
        _check_schedule(args)
    param_groups(model, **{**_read_numbers(args), **settings})
    return MupOptimizerFactory, {
        "optimizer_class": optimizer_class,
        "args": args,
        "settings": settings,
        "options": options,
    }


class MupOptimizerFactory:
    """What the Trainer calls when it needs an optimizer; see ``trainer_optimizer``."""

    def __call__(
        self,
        model: nn.Module,
        optimizer_class: type[Optimizer],
        args: Any,
        settings: dict[str, Any],
        options: dict[str, Any],
    ) -> Optimizer:
        """An optimizer on the groups of the model; ``defaults["lr"]`` is the base rate, which schedules with a floor divide by."""
        settings = {**_read_numbers(args), **settings}
        if args is not None and settings["rule"] == "adam":
            options = {"betas": (args.adam_beta1, args.adam_beta2), **options}
        return optimizer_class(param_groups(model, **settings), lr=settings["lr"], **options)  # type: ignore[call-arg]


def _read_numbers(args: Any) -> dict[str, float]:
    """Of ``TrainingArguments`` as they are now; the defaults without."""
    if args is None:
        return {"weight_decay": 0.0, "eps": _DEFAULT_EPS}
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}


def _choose_rule(optimizer_class: type[Optimizer], rule: Optimiser | None) -> Optimiser:
    if rule is not None:
        return rule
    known = _RULE_OF.get(optimizer_class)
    if known is None:
        raise ValueError(
            f"trainer_optimizer: {optimizer_class.__name__} is none of {', '.join(c.__name__ for c in _RULE_OF)}; if "
            "multiplying all gradients by a number does not change its update, write rule='adam', if it changes it in "
            "proportion, rule='sgd'. An optimizer that chooses learning rates itself (Adafactor with relative_step, "
            "Prodigy, D-Adaptation) cannot keep µP's"
        )
    return known


def _check_schedule(args: Any) -> None:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    floor = (args.lr_scheduler_kwargs or {}).get("min_lr", 1e-3 if name == "greedy" else 0)
    if name in _ABSOLUTE_SCHEDULES and floor:
        raise ValueError(
            f"lr_scheduler_type={name!r} holds every group above min_lr={floor}, which breaks the ratios between groups; "
            "write lr_scheduler_kwargs={'min_lr': 0}, or another schedule (cosine, linear, WSD, cosine_with_min_lr)"
        )
