"""One-dimensional minima and roots of smooth functions of a positive number, on the logarithm, with no dependency."""

from collections.abc import Callable
from math import exp, inf, log

GOLDEN = (5**0.5 - 1) / 2


def minimize_scale(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-8) -> float:
    """Argument of the minimum of a unimodal function between two positive numbers, by golden section.

    Args:
        function: unimodal in log x.
        low: smallest x.
        high: largest x.
        tolerance: of log x; the value there is exact to its square.

    Raises:
        ValueError: ends that are not positive and in order.
    """
    if not 0 < low <= high:
        raise ValueError(f"low and high must be positive and in order, got {low} and {high}")
    a, b = log(low), log(high)
    x, y = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    at_x, at_y = function(exp(x)), function(exp(y))
    while b - a > tolerance:
        if at_x <= at_y:
            b, y, at_y = y, x, at_x
            x = b - GOLDEN * (b - a)
            at_x = function(exp(x))
        else:
            a, x, at_x = x, y, at_y
            y = a + GOLDEN * (b - a)
            at_y = function(exp(y))
    middle = exp((a + b) / 2)
    # An edge is a minimum too, and there the middle falls short of it.
    return min((low, middle, high), key=function)


def find_crossing(
    function: Callable[[float], float], target: float, low: float, high: float, tolerance: float = 1e-10
) -> float:
    """Where a decreasing function of a positive number equals ``target``: false position, every third step a bisection.

    Args:
        function: decreasing.
        target: value to reach.
        low: smallest x.
        high: largest x.
        tolerance: of log x.

    Returns:
        0 where the function is below the target everywhere, inf where it is above.
    """
    a, b = log(low), log(high)
    at_a, at_b = function(low) - target, function(high) - target
    if at_a < 0:
        return 0.0
    if at_b > 0:
        return inf
    step = 0
    while b - a > tolerance:
        step += 1
        x = (a + b) / 2 if step % 3 == 0 else b - at_b * (b - a) / (at_b - at_a)
        # Never onto an end, from where no step follows; a hair beside it closes the bracket once the root is that near.
        x = min(max(x, a + tolerance / 4), b - tolerance / 4)
        value = function(exp(x)) - target
        if value > 0:
            a, at_a = x, value
        else:
            b, at_b = x, value
    return exp((a + b) / 2)
