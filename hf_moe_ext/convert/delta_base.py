"""The base that experts share: the dense parent's matrix, their mean, or what leaves the least error after encoding.

Of plain deltas least squares is the mean: it minimises ``sum_i ||W_i - W||^2``. What is stored, though, is not the delta but
its code, and the base that minimises ``sum_i ||W_i - W - code_i||^2`` is another one: for given codes it is the mean of
``W_i - code_i``, and for a given base the codes are the encoder's. ``least_squares_base`` takes these steps in turn. A
truncated SVD and a magnitude drop are the best of their form, so that no step can raise the error; quantisation is nearly so,
and the best base that was seen is the one returned. A random drop gains nothing: its expected error is
``p / (1 - p) ||D_i||^2``, least at the mean.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Each step reads and encodes every expert; most of the gain comes with the first two.
MAX_STEPS = 4

Experts = Callable[[], Iterator[Tensor]]
Approximate = Callable[[Tensor, int], Tensor]


def mean_base(experts: Experts) -> Tensor:
    """Mean of the experts' matrices, in float32 (float64 for float64).

    Args:
        experts: gives them one by one, [rows, cols] each, anew at each call.
    """
    total, count = None, 0
    for expert in experts():
        wide = expert.to(torch.promote_types(expert.dtype, torch.float32))
        total, count = (wide.clone() if total is None else total.add_(wide)), count + 1
    if total is None:
        raise ValueError("no experts to take a mean of")
    return total / count


def least_squares_base(
    experts: Experts, start: Tensor, approximate: Approximate, dtype: torch.dtype, max_steps: int = MAX_STEPS
) -> tuple[Tensor, list[float]]:
    """The base with the least error after encoding that steps from ``start`` come to.

    Args:
        experts: gives them one by one, [rows, cols] each, anew at each call.
        start: base to begin with.
        approximate: delta and expert's number to the decoded code.
        dtype: what the base is stored as; errors are those of the stored base.
        max_steps: how often codes and base change.

    Returns:
        The base in ``dtype``, and the sum of squared errors of every base that was tried, the first is that of ``start``.
    """
    base, errors = start.to(dtype), []
    best, least = base, float("inf")
    for _ in range(max_steps + 1):
        wide = base.to(start.dtype)
        total, error, count = torch.zeros_like(start), 0.0, 0
        for number, expert in enumerate(experts()):
            delta = expert.to(start.dtype) - wide
            rest = delta - approximate(delta, number).to(start.dtype)
            error += float(rest.double().square().sum())
            total += rest
            count += 1
        errors.append(error)
        if error >= least:
            break
        best, least = base, error
        # W_i - code_i is the base plus what the code leaves.
        base = (wide + total / count).to(dtype)
    return best, errors
