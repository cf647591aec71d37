"""Refuses sizes that cannot be: one rule for every dataclass of counts."""

from typing import Any


def check_at_least(owner: Any, bound: int, *names: str) -> None:
    """Each named attribute is a whole number and not below the bound; None passes (an optional part that is absent).

    Raises:
        TypeError: not an integer.
        ValueError: below the bound.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{type(owner).__name__}: {name} must be an integer, got {value!r}")
        if value < bound:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least {bound}, got {value}")
