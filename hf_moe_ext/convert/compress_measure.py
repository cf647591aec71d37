"""What is known of a layer's matrix before and after it is encoded: closeness to the base, distances, errors."""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_ext.convert.delta_encoding import Encoding, squared_errors
from hf_moe_ext.ops.delta_measures import DeltaMeasures, form_delta, output_norm
from hf_moe_ext.ops.delta_metadata import check_matrix

# Entries of all experts together that pairwise distances are taken over, at most; beyond, over evenly spaced rows.
_MAX_DISTANCE_ENTRIES = 2**20
# Entries that are held in float64 at a time.
_BLOCK_ENTRIES = 2**17


@dataclass(frozen=True)
class MatrixMeasures:
    """One matrix of all experts of a layer beside the base.

    Attributes:
        layer: decoder layer.
        matrix: "gate", "up" or "down".
        cosines: of each expert to the base.
        relative_norms: ||D|| / ||W||, W the base, of each expert.
        squared_errors: for each encoding asked about, the mean over experts of the squared relative output error.
        distance: mean over pairs of experts of ||W_i - W_j||, over the mean ||W_i||.
    """

    layer: int
    matrix: str
    cosines: tuple[float, ...]
    relative_norms: tuple[float, ...]
    squared_errors: tuple[float, ...]
    distance: float


def input_moments(gain: Tensor | None, num_columns: int) -> Tensor:
    """E[x_j^2] of a matrix's inputs, taken without data, [columns], float32.

    Gate and up read rows of an RMS norm, so that the squared gain is what an average row has; of what ``down`` reads nothing
    is known, and 1 is taken.
    """
    return torch.ones(num_columns) if gain is None else gain.float().square()


def measure_matrix(
    layer: int,
    matrix: str,
    experts: Callable[[], Iterator[Tensor]],
    num_experts: int,
    base: Tensor,
    moments: Tensor,
    encodings: Sequence[Encoding] = (),
) -> MatrixMeasures:
    """Measure one matrix of all experts, one expert in memory at a time.

    Args:
        layer: for the result.
        matrix: for the result.
        experts: gives the experts' matrices [rows, cols] one by one.
        num_experts: how many.
        base: [rows, cols], as it will be stored.
        moments: E[x_j^2] of the inputs, [cols].
        encodings: whose errors to predict.

    Raises:
        ValueError: entries that are not finite, a base of zeros.
    """
    cosines, norms, errors, samples = [], [], [0.0] * len(encodings), []
    for expert in experts():
        cosine, norm = measure_closeness(expert, base)
        cosines.append(cosine)
        norms.append(norm)
        samples.append(sample_rows(expert, num_experts))
        if encodings:
            output = squared_output(expert, moments)
            added = squared_errors(form_delta(expert, base), encodings, moments)
            errors = [error + divide(each, output) / num_experts for error, each in zip(errors, added, strict=True)]
        give_back_memory()
    distance = mean_distance(samples)
    return MatrixMeasures(layer, matrix, tuple(cosines), tuple(norms), tuple(errors), distance)


def measure_closeness(expert: Tensor, base: Tensor) -> DeltaMeasures:
    """As ``ops.delta_measures.measure_delta``, some rows at a time: sums in float64, of which no whole matrix is held.

    Raises:
        ValueError: entries that are not finite, a base of zeros.
    """
    product = of_expert = of_base = of_delta = 0.0
    for rows in _row_blocks(expert.shape):
        left, right = expert[rows].double(), base[rows].double()
        product += float((left * right).sum())
        of_expert, of_base = of_expert + float(left.square().sum()), of_base + float(right.square().sum())
        of_delta += float(left.sub_(right).square_().sum())
    if not math.isfinite(of_expert + of_base):
        check_matrix("expert", expert)
        check_matrix("base", base)
    if of_base == 0:
        raise ValueError(
            "base is zero everywhere, so cosine and relative norm mean nothing; it is not a trained matrix"
        )
    cosine = product / math.sqrt(of_base * of_expert) if of_expert else 0.0
    return DeltaMeasures(cosine, math.sqrt(of_delta / of_base))


def squared_output(matrix: Tensor, moments: Tensor) -> float:
    """``ops.delta_measures.output_norm`` squared, some rows at a time."""
    return sum(output_norm(matrix[rows], moments) ** 2 for rows in _row_blocks(matrix.shape))


def _row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    size = max(1, _BLOCK_ENTRIES // shape[1])
    return (slice(start, start + size) for start in range(0, shape[0], size))


def sample_rows(matrix: Tensor, num_experts: int) -> Tensor:
    """Evenly spaced rows of an expert's matrix, all of them if there is room, [rows, cols] in float32."""
    room = max(1, _MAX_DISTANCE_ENTRIES // (num_experts * matrix.shape[1]))
    # A copy: a view would keep the whole matrix.
    return matrix[:: math.ceil(matrix.shape[0] / room)].to(torch.float32, copy=True)


def mean_distance(matrices: Sequence[Tensor]) -> float:
    """Mean over pairs of ``||W_i - W_j||``, over the mean ``||W_i||``; 0 for one matrix."""
    pairs = [float((left - right).norm()) for i, left in enumerate(matrices) for right in matrices[i + 1 :]]
    norm = sum(float(matrix.norm()) for matrix in matrices) / len(matrices)
    return divide(sum(pairs) / len(pairs), norm) if pairs else 0.0


def divide(part: float, whole: float) -> float:
    """A share; 0 of nothing for nothing, infinite for something of nothing."""
    return part / whole if whole else (math.inf if part else 0.0)


def give_back_memory() -> None:
    """Return freed memory to the system where the C library is one that keeps it (glibc); elsewhere nothing is done."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
