"""IsoFLOP surface of one budget (Abnar et al., arXiv 2501.12370, equation 8): an interpolant, not a law.

With x = ln N and y = -ln(1 - S)::

    L = a1 x + a2 x^2 + b1 y + b2 y^2 + c1 x y + c2 (x y)^2 + d0

fitted by least squares to runs of one budget. The paper prints no values, so there are none here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np

from hf_moe_ext.scaling.laws.card import Flag

# Whatever was sampled: never report an optimum beyond.
LARGEST_SPARSITY = 0.98
NUM_COEFFICIENTS = 7


@dataclass(frozen=True)
class SurfaceOptimum:
    """Where the surface is lowest along one axis.

    Attributes:
        value: N or S.
        flags: the reasons why it is an edge and no minimum, or out of the sampled range.
    """

    value: float
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class IsoFlopSurface:
    """Coefficients (a1, a2, b1, b2, c1, c2, d0) and what was sampled.

    Attributes:
        coefficients: seven.
        parameter_range: smallest and largest N of the runs.
        sparsity_range: smallest and largest S of the runs.
    """

    coefficients: tuple[float, ...]
    parameter_range: tuple[float, float]
    sparsity_range: tuple[float, float]

    def __post_init__(self) -> None:
        if len(self.coefficients) != NUM_COEFFICIENTS:
            raise ValueError(f"a surface has {NUM_COEFFICIENTS} coefficients, got {len(self.coefficients)}")

    def loss(self, parameters: float, sparsity: float) -> float:
        """L at one N and S."""
        return float(_features(np.array([parameters]), np.array([sparsity]))[0] @ np.array(self.coefficients))

    def best_parameters(self, sparsity: float) -> SurfaceOptimum:
        """N* at fixed S: ln N* = -B / (2 A), A = a2 + c2 y^2, B = a1 + c1 y, inside the sampled range."""
        a1, a2, _, _, c1, c2, _ = self.coefficients
        y = -log(1 - sparsity)
        low, high = self.parameter_range
        x, flags = _lowest(a2 + c2 * y * y, a1 + c1 * y, log(low), log(high), "N")
        return SurfaceOptimum(exp(x), flags + self._outside("S", sparsity, self.sparsity_range))

    def best_sparsity(self, parameters: float) -> SurfaceOptimum:
        """S* at fixed N: y* = max(0, -B / (2 A)), A = b2 + c2 x^2, B = b1 + c1 x; an edge of the sampled S where A <= 0."""
        _, _, b1, b2, c1, c2, _ = self.coefficients
        x = log(parameters)
        low, high = self.sparsity_range[0], min(self.sparsity_range[1], LARGEST_SPARSITY)
        y, flags = _lowest(b2 + c2 * x * x, b1 + c1 * x, -log(1 - low), -log(1 - high), "S")
        return SurfaceOptimum(1 - exp(-y), flags + self._outside("N", parameters, self.parameter_range))

    def _outside(self, name: str, value: float, sampled: tuple[float, float]) -> tuple[Flag, ...]:
        if sampled[0] <= value <= sampled[1]:
            return ()
        return (
            Flag("outside_range", f"{name} = {value:.4g} is outside {sampled[0]:.4g} to {sampled[1]:.4g}, the runs"),
        )


def _lowest(square: float, linear: float, low: float, high: float, name: str) -> tuple[float, tuple[Flag, ...]]:
    """Where square t^2 + linear t is lowest between two ends."""
    if square <= 0:
        edge = min((low, high), key=lambda t: square * t * t + linear * t)
        return edge, (Flag("outside_range", f"the surface has no minimum in {name}: the best is an edge of the runs"),)
    free = -linear / (2 * square)
    if low <= free <= high:
        return free, ()
    return min(max(free, low), high), (Flag("outside_range", f"the minimum in {name} lies beyond the runs: an edge"),)


def _features(parameters: np.ndarray, sparsity: np.ndarray) -> np.ndarray:
    x, y = np.log(parameters), -np.log1p(-sparsity)
    return np.stack([x, x**2, y, y**2, x * y, (x * y) ** 2, np.ones_like(x)], axis=1)


def fit_surface(parameters: Sequence[float], sparsity: Sequence[float], losses: Sequence[float]) -> IsoFlopSurface:
    """Least squares on the runs of one budget.

    Raises:
        ValueError: fewer runs than coefficients, or runs that do not determine them.
    """
    n, s, target = (np.asarray(values, dtype=float) for values in (parameters, sparsity, losses))
    if not (len(n) == len(s) == len(target)) or len(n) < NUM_COEFFICIENTS:
        raise ValueError(
            f"a surface of {NUM_COEFFICIENTS} coefficients needs at least as many runs of one budget, got {len(n)} sizes, "
            f"{len(s)} sparsities and {len(target)} losses"
        )
    features = _features(n, s)
    # Columns of like size and a centred target: x^2 and (x y)^2 differ by orders of magnitude.
    sizes = np.abs(features).max(axis=0)
    sizes[sizes == 0] = 1
    solution, _, rank, _ = np.linalg.lstsq(features / sizes, target, rcond=1e-14)
    if rank < NUM_COEFFICIENTS:
        raise ValueError(
            f"the runs determine {rank} of {NUM_COEFFICIENTS} coefficients; vary N at three or more sparsities"
        )
    return IsoFlopSurface(
        tuple(float(c) for c in solution / sizes),
        parameter_range=(float(n.min()), float(n.max())),
        sparsity_range=(float(s.min()), float(s.max())),
    )
