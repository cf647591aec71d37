"""How far an expert is from its base, and what coding the difference will do to the output.

Formulas of the random drop: each entry of ``D`` becomes ``D z / (1 - p)`` with independent ``z`` in {0, 1}, so its variance
is ``D^2 p / (1 - p)``; summed over independent entries the squared output error of a row ``x`` is
``p / (1 - p) sum_j x_j^2 sum_o D_oj^2``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_metadata import check_matrix
from hf_moe_ext.ops.delta_positions import check_drop_rate


class DeltaMeasures(NamedTuple):
    """An expert's matrix beside its base's.

    Attributes:
        cosine: of the two as vectors; blind to rescaling, so read it with the next.
        relative_norm: ||D|| / ||W||.
    """

    cosine: float
    relative_norm: float


def form_delta(expert: Tensor, base: Tensor) -> Tensor:
    """``expert - base`` in float32 (float64 if either is).

    Exact for two bfloat16 numbers up to an exponent gap of 16; a difference formed in bfloat16 would be inexact in about 1 %
    of the entries at a relative delta of 4.5 %.

    Raises:
        ValueError: the base is missing, the shapes differ, or an entry is not finite.
        TypeError: no floating-point tensor.
    """
    if base is None:
        raise ValueError("base is missing; give the dense parent's matrix, which an upcycled expert was copied from")
    check_matrix("expert", expert)
    check_matrix("base", base)
    if expert.shape != base.shape:
        raise ValueError(
            f"expert and base must have one shape, got {tuple(expert.shape)} and {tuple(base.shape)}; split a fused "
            "gate_up first, or look for the parent this model was made from"
        )
    work = torch.promote_types(torch.promote_types(expert.dtype, base.dtype), torch.float32)
    return expert.to(work) - base.to(work)


def measure_delta(expert: Tensor, base: Tensor) -> DeltaMeasures:
    """Cosine and relative norm, summed in float64.

    Raises:
        ValueError, TypeError: see ``form_delta``; also a base of zeros, which has neither.
    """
    delta = form_delta(expert, base)
    squared_base, squared_expert = _square_sum(base), _square_sum(expert)
    if squared_base == 0:
        raise ValueError(
            "base is zero everywhere, so cosine and relative norm mean nothing; it is not a trained matrix"
        )
    product = float((expert.double() * base.double()).sum())
    cosine = product / math.sqrt(squared_base * squared_expert) if squared_expert else 0.0
    return DeltaMeasures(cosine, math.sqrt(_square_sum(delta) / squared_base))


def relative_error(approximation: Tensor, delta: Tensor) -> float:
    """||approximation - delta|| / ||delta||, in float64; 0 for two zeros, infinite where only the delta is zero."""
    error, norm = _square_sum(approximation.double() - delta.double()), _square_sum(delta)
    return math.sqrt(error / norm) if norm else (math.inf if error else 0.0)


def merge_out(base: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """``base + delta`` added in at least float32, then rounded to ``dtype``."""
    work = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return (base.to(work) + delta.to(work)).to(dtype)


def merge_out_error(base: Tensor, delta: Tensor, dtype: torch.dtype) -> float:
    """Relative error that storing ``base + delta`` in ``dtype`` makes in the *delta*: 17 % at 1 % of a bfloat16 base."""
    return relative_error(merge_out(base.double(), delta.double(), dtype).double() - base.double(), delta)


def drop_error(drop_rate: float) -> float:
    """Expected relative error of a randomly dropped and rescaled delta, sqrt(p / (1 - p)): 3.0 at 0.9.

    Raises:
        ValueError: drop_rate outside (0, 1).
    """
    check_drop_rate(drop_rate)
    return math.sqrt(drop_rate / (1 - drop_rate))


def output_norm(matrix: Tensor, second_moments: Tensor) -> float:
    """Root mean square of ``||matrix x||`` over inputs x.

    Args:
        matrix: [rows, cols]; a delta, a weight, or the error of a code.
        second_moments: E[x x^T] [cols, cols], or its diagonal [cols] for inputs taken as uncorrelated.

    Raises:
        ValueError: shapes that do not match.
    """
    matrix, second_moments = matrix.double(), second_moments.double()
    _check_moments(matrix, second_moments)
    if second_moments.ndim == 1:
        return math.sqrt(float((matrix.square().sum(0) * second_moments).sum()))
    return math.sqrt(max(0.0, float(((matrix @ second_moments) * matrix).sum())))


def dropped_output_error(delta: Tensor, weight: Tensor, drop_rate: float, second_moments: Tensor) -> float:
    """Expected error of a layer's output when its delta is dropped at random and rescaled, relative to the output.

    The numerator is exact and needs the diagonal of the moments only, whatever correlates; the denominator is the output of
    ``weight``. For uncorrelated inputs this is close to ``drop_error(p) ||D x|| / ||W x||``.

    Args:
        delta: [rows, cols] D.
        weight: [rows, cols] W, the base or the expert.
        drop_rate: p.
        second_moments: E[x x^T] [cols, cols] or its diagonal [cols].

    Raises:
        ValueError: shapes that do not match, drop_rate outside (0, 1), or an output that is zero.
    """
    _check_moments(delta, second_moments)
    output = output_norm(weight, second_moments)
    if output == 0:
        raise ValueError("the output of weight is zero for these second_moments; measure them on real inputs")
    diagonal = second_moments if second_moments.ndim == 1 else second_moments.diagonal()
    return drop_error(drop_rate) * output_norm(delta, diagonal) / output


def _check_moments(matrix: Tensor, second_moments: Tensor) -> None:
    cols = matrix.shape[1]
    if tuple(second_moments.shape) not in ((cols,), (cols, cols)):
        raise ValueError(
            f"second_moments must be [{cols}] or [{cols}, {cols}] for a matrix with {cols} columns, got "
            f"{tuple(second_moments.shape)}; columns are the inputs"
        )


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
