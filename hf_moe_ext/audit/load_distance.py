"""How far two loads are apart, and how far chance alone would put them. Pure functions of counts."""

import numpy as np

# Added to each count, so that an expert that one side never used does not make the divergence infinite (Jeffreys' prior).
PSEUDO_COUNT = 0.5


def total_variation(counts: np.ndarray, others: np.ndarray) -> float:
    """Share of the choices that would have to move to other experts, 0 to 1: half the sum of ``|f - g|``."""
    return float(np.abs(_shares(counts) - _shares(others)).sum() / 2)


def divergence(counts: np.ndarray, others: np.ndarray) -> float:
    """Kullback-Leibler divergence of one load from another, nats: ``sum f log(f / g)``, each count half a token larger."""
    f, g = _shares(np.asarray(counts) + PSEUDO_COUNT), _shares(np.asarray(others) + PSEUDO_COUNT)
    return max(0.0, float((f * np.log(f / g)).sum()))


def chance_distance(counts: np.ndarray, others: np.ndarray) -> float:
    """Expected total variation of two samples of these sizes from one load, as if choices were independent.

    By the normal approximation of each share: ``sum sqrt(p (1 - p) (1/n + 1/m)) / sqrt(2 pi)``. Choices of one text are
    not independent, so the true distance by chance is larger.
    """
    counts, others = np.asarray(counts, dtype=np.float64), np.asarray(others, dtype=np.float64)
    sizes = counts.sum(), others.sum()
    if min(sizes) == 0:
        return 1.0
    pooled = _shares(counts + others)
    return float(np.sqrt(pooled * (1 - pooled) * (1 / sizes[0] + 1 / sizes[1])).sum() / np.sqrt(2 * np.pi))


def chance_divergence(counts: np.ndarray, others: np.ndarray) -> float:
    """Expected divergence of two samples of these sizes from one load, nats: ``(E - 1) / 2 * (1/n + 1/m)`` (chi-squared)."""
    sizes = np.sum(counts), np.sum(others)
    return float((len(counts) - 1) / 2 * (1 / sizes[0] + 1 / sizes[1])) if min(sizes) else float("inf")


def _shares(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.float64)
    return counts / max(counts.sum(), 1e-300)
