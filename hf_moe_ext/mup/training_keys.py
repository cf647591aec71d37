"""Kinds and ranges of the training arguments that a transfer takes over."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_moe_ext.mup.small_run import TransferError

STEP_COUNTS = ("num_decay_steps", "num_stable_steps", "num_warmup_steps")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) and value >= 0


def _is_schedule(value: Any) -> bool:
    return isinstance(value, Mapping) and all(value.get(name) is None or _is_count(value[name]) for name in STEP_COUNTS)


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE: _Rule = ("a number from 0", lambda value: _is_number(value) and value >= 0)
_BETA: _Rule = ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_COUNT: _Rule = ("a whole number from 1", lambda value: _is_count(value) and value >= 1)
_NAME: _Rule = ("a name", lambda value: isinstance(value, str) and value != "")
_SCHEDULE: _Rule = (f"'key: value' pairs, whole numbers for {', '.join(STEP_COUNTS)}", _is_schedule)
_RULES: dict[str, _Rule] = {
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "optim": _NAME,
    "lr_scheduler_type": _NAME,
    "lr_scheduler_kwargs": _SCHEDULE,
    "warmup_steps": _NOT_NEGATIVE,  # below 1 a share of the steps
    "max_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT,
}


def check_training_arguments(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The same arguments, whole numbers as integers.

    Args:
        arguments: by name; names without a rule are passed on.
        source: what the error says they are of.

    Raises:
        TransferError: naming the argument, the rule, the value and the next step.
    """
    checked = dict(arguments)
    for name, (rule, holds) in _RULES.items():
        if name not in arguments:
            continue
        value = arguments[name]
        if not holds(value):
            raise TransferError(
                f"{name} must be {rule}, got {value!r} in the training arguments of {source}; correct it where it is "
                f"written, or give the right one in --arguments FILE"
            )
        if holds is _COUNT[1]:
            checked[name] = int(value)
    return checked
