"""What is known of a layer's matrix before and after it is encoded: closeness to the base, distances, errors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_ext.convert.delta_encoding import Encoding, squared_errors
from hf_moe_ext.ops.delta_measures import form_delta, measure_delta, output_norm

# Entries of all experts together that pairwise distances are taken over, at most; beyond, over evenly spaced rows.
_MAX_DISTANCE_ENTRIES = 2**21


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
        cosine, norm = measure_delta(expert, base)
        cosines.append(cosine)
        norms.append(norm)
        samples.append(sample_rows(expert, num_experts))
        if encodings:
            output = output_norm(expert, moments) ** 2
            added = squared_errors(form_delta(expert, base), encodings, moments)
            errors = [error + divide(each, output) / num_experts for error, each in zip(errors, added, strict=True)]
    distance = mean_distance(samples)
    return MatrixMeasures(layer, matrix, tuple(cosines), tuple(norms), tuple(errors), distance)


def sample_rows(matrix: Tensor, num_experts: int) -> Tensor:
    """Evenly spaced rows of an expert's matrix, all of them if there is room, [rows, cols] in float32."""
    room = max(1, _MAX_DISTANCE_ENTRIES // (num_experts * matrix.shape[1]))
    return matrix[:: math.ceil(matrix.shape[0] / room)].float()


def mean_distance(matrices: Sequence[Tensor]) -> float:
    """Mean over pairs of ``||W_i - W_j||``, over the mean ``||W_i||``; 0 for one matrix."""
    pairs = [
        float((left - right).norm()) for i, left in enumerate(matrices) for right in matrices[i + 1 :]
    ]
    norm = sum(float(matrix.norm()) for matrix in matrices) / len(matrices)
    return divide(sum(pairs) / len(pairs), norm) if pairs else 0.0


def divide(part: float, whole: float) -> float:
    """A share; 0 of nothing for nothing, infinite for something of nothing."""
    return part / whole if whole else (math.inf if part else 0.0)
