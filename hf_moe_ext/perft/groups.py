"""Optimizer groups: routers want a learning rate of their own, and no weight decay."""

import warnings
from typing import Any

from torch import nn

ROUTER_PARAMETERS = ("perft_router", "perft_base_router")


def param_groups(
    model: nn.Module, lr: float, router_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What to hand to an optimizer: ``torch.optim.AdamW(param_groups(model, lr=2e-4, router_lr=1e-3))``.

    With the Trainer: ``optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": param_groups(...)})`` (it builds the
    optimizer itself, at the right moment), or ``optimizers=(optimizer, None)``.

    Args:
        model: a model with PERFT adapters; only what requires a gradient is taken.
        lr: learning rate of the adapters and of whatever else trains.
        router_lr: learning rate of the routers (the adapters' own, and the base model's where ``base_router`` tunes it);
            None: ``lr``.
        weight_decay: of everything but routers, biases and norms.

    Returns:
        Up to three groups named "weights", "no_decay" and "routers"; empty ones are left out.

    Raises:
        ValueError: nothing of the model trains, or a rate is negative.
    """
    for name, value in (("lr", lr), ("router_lr", router_lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0:
            raise ValueError(f"param_groups: {name} must be a number of at least 0; got {value!r}")
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "no_decay": [], "routers": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, parameter)].append(parameter)
    if not any(groups.values()):
        raise ValueError("param_groups: no parameter of this model requires a gradient; attach an adapter first")
    if router_lr is not None and not groups["routers"]:
        warnings.warn(
            "param_groups: router_lr has no effect; this model trains no router (variant R has one, base_router "
            "'lora' or 'train' another)",
            stacklevel=2,
        )
    settings = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "no_decay": {"lr": lr, "weight_decay": 0.0},
        "routers": {"lr": lr if router_lr is None else router_lr, "weight_decay": 0.0},
    }
    return [{"name": name, "params": parameters, **settings[name]} for name, parameters in groups.items() if parameters]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if any(part in name for part in ROUTER_PARAMETERS):
        return "routers"
    return "no_decay" if parameter.ndim < 2 else "weights"
