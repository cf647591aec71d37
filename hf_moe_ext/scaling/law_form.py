"""What a functional form is: logarithms of its terms, the derivatives of those, and where a fit of it begins.

Every form is L = sum of terms, each exp(offset + sum of exponents times features). Features are centred, so that a term's
offset and its exponents hardly correlate and L-BFGS converges; ``Form.coefficients`` gives the usual numbers back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

Array = np.ndarray
ParameterKind = Literal["scale", "exponent", "interaction", "irreducible", "start", "limit", "low_start", "free"]

# Starts printed in arXiv 2502.05172; scales and irreducible terms as logarithms. "start" and "limit" are of the saturating
# transform of a number of experts.
START_GRID: dict[ParameterKind, tuple[float, ...]] = {
    "scale": tuple(float(v) for v in np.log((30.0, 100.0, 300.0))),
    "exponent": (0.05, 0.25, 0.5),
    "interaction": (-0.5, 0.0, 0.5),
    "irreducible": tuple(float(v) for v in np.log((0.5, 1.0, 2.0))),
    "start": tuple(float(v) for v in np.log((1.5, 2.5, 4.0))),
    "limit": tuple(float(v) for v in np.log((100.0, 300.0, 1000.0))),
    "low_start": tuple(float(v) for v in np.log((0.005, 0.02, 0.05))),
    "free": (-0.1, 0.0, 0.1),
}
LARGEST_LOG = 50.0


@dataclass(frozen=True)
class Parameter:
    """One number to fit.

    Attributes:
        name: as the paper calls it; a scale is fitted as its logarithm.
        kind: which starts it gets, and whether it is a logarithm.
        unit: what the fitted number is multiplied with to be the paper's (powers of 10 instead of e).
    """

    name: str
    kind: ParameterKind
    unit: float = 1.0

    @property
    def is_log(self) -> bool:
        """Whether the fitted number is the logarithm of the named one."""
        return self.kind in ("scale", "irreducible", "start", "limit", "low_start")


@dataclass(frozen=True)
class Term:
    """exp(offset + sum sign * parameter * feature); no offset is 0."""

    offset: str | None
    factors: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A form's view of some runs.

    Attributes:
        features: by name, [runs]; centred.
        centres: what was taken off.
        saturating: x of the saturating transform, [runs]; None where the form has none.
    """

    features: Mapping[str, Array]
    centres: Mapping[str, float]
    saturating: Array | None


@dataclass(frozen=True)
class Form:
    """A law's formula with free coefficients.

    Attributes:
        name: for tables and options.
        title: the formula.
        variables: columns it needs.
        parameters: what is fitted, in order.
        terms: the sum.
        features: logarithms of the variables, by name.
        saturating: variable (less its smallest value) whose saturated logarithm is the feature "e".
        products: features that are products of "e" and another one, and are made anew as E_s and E_m move.
        target: column that is fitted; its logarithm has the residuals.
        size_variable: which variable is a size, for hold-outs.
        sparsity_variable: which one says how sparse.
    """

    name: str
    title: str
    variables: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    terms: tuple[Term, ...]
    features: Mapping[str, Callable[[Mapping[str, Array]], Array]]
    saturating: Callable[[Mapping[str, Array]], Array] | None = None
    products: Mapping[str, str] = field(default_factory=dict)
    target: str = "loss"
    size_variable: str = "total_parameters"
    sparsity_variable: str | None = "sparsity"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def prepare(self, data: Mapping[str, Array], centres: Mapping[str, float] | None = None) -> Prepared:
        """Features of runs, centred at their own means or at given ones."""
        raw = {name: np.asarray(function(data), dtype=float) for name, function in self.features.items()}
        if centres is None:
            centres = {name: float(values.mean()) for name, values in raw.items()}
        features = {name: values - centres[name] for name, values in raw.items()}
        saturating = None if self.saturating is None else np.asarray(self.saturating(data), dtype=float)
        return Prepared(features, centres, saturating)

    def log_prediction(self, theta: Array, data: Prepared) -> tuple[Array, Array, Array]:
        """Log L [runs], its derivative [parameters, runs] and the terms' shares [terms, runs].

        ``theta`` has the offsets at the centre. Logarithm of the sum of exponentials; its derivative is the mean of the
        terms' derivatives, weighted with their shares (softmax).
        """
        index = self._index
        features, moved = self._moving_features(theta, index, data)
        num_runs = len(next(iter(data.features.values())))
        logs = np.zeros((len(self.terms), num_runs))
        for value, term in zip(logs, self.terms, strict=True):
            if term.offset is not None:
                value += theta[index[term.offset]]
            for name, feature, sign in term.factors:
                value += sign * theta[index[name]] * features[feature]
        top = logs.max(axis=0)
        shares = np.exp(logs - top)
        total = shares.sum(axis=0)
        shares /= total
        slopes = np.zeros((len(theta), num_runs))
        for share, term in zip(shares, self.terms, strict=True):
            if term.offset is not None:
                slopes[index[term.offset]] += share
            for name, feature, sign in term.factors:
                slopes[index[name]] += sign * share * features[feature]
                for mover, slope in moved.get(feature, {}).items():
                    slopes[index[mover]] += sign * theta[index[name]] * share * slope
        return top + np.log(total), slopes, shares

    def _moving_features(
        self, theta: Array, index: Mapping[str, int], data: Prepared
    ) -> tuple[Mapping[str, Array], dict[str, dict[str, Array]]]:
        """Features with those that depend on E_s and E_m, and the derivatives of these by log E_s and log(E_m - E_s)."""
        if data.saturating is None:
            return data.features, {}
        effective, by_start, by_limit = _saturated_log(data.saturating, theta[index["E_start"]], theta[index["E_max"]])
        features = {**data.features, "e": effective}
        slopes = {"e": {"E_start": by_start, "E_max": by_limit}}
        for name, other in self.products.items():
            features[name] = effective * data.features[other]
            slopes[name] = {key: slope * data.features[other] for key, slope in slopes["e"].items()}
        return features, slopes

    def centre(self, natural: Array, centres: Mapping[str, float]) -> Array:
        """Offsets at x = 0, as papers print them, to offsets at the centre."""
        return self._shift(natural, centres, 1.0)

    def natural(self, theta: Array, centres: Mapping[str, float]) -> Array:
        """The inverse of ``centre``."""
        return self._shift(theta, centres, -1.0)

    def _shift(self, theta: Array, centres: Mapping[str, float], sign: float) -> Array:
        index, shifted = self._index, np.array(theta, dtype=float)
        for term in self.terms:
            exponents = {feature: (index[name], factor) for name, feature, factor in term.factors}
            for feature, (i, factor) in exponents.items():
                if feature in centres and term.offset is not None:
                    shifted[index[term.offset]] += sign * factor * theta[i] * centres[feature]
                elif feature in self.products and "e" in exponents:
                    # gamma e x = gamma e (x - x0) + gamma x0 e: the product's centre goes to the exponent of e.
                    j, e_factor = exponents["e"]
                    shifted[j] += sign * factor * theta[i] * centres[self.products[feature]] / e_factor
        return shifted

    def coefficients(self, theta: Array, centres: Mapping[str, float]) -> dict[str, float]:
        """By the paper's names: scales as numbers, exponents as printed, E_m itself."""
        natural = self.natural(theta, centres)
        values = {
            p.name: float(np.exp(min(v, 700.0)) if p.is_log else v * p.unit)
            for p, v in zip(self.parameters, natural, strict=True)
        }
        if "E_max" in values:
            values["E_max"] += values["E_start"]
        return values


def _saturated_log(x: Array, log_start: float, log_rise: float) -> tuple[Array, Array, Array]:
    """Ln x^ and its derivatives by ln s and ln(m - s): 1/x^ = 1/(x + 1/(1/s - 1/m)) + 1/m."""
    start, rise = np.exp(np.clip((log_start, log_rise), -LARGEST_LOG, LARGEST_LOG))
    limit = start + rise
    # 1/s - 1/m as a quotient: a difference would vanish where m is hardly above s.
    inverse = rise / (start * limit)
    shifted = x + 1 / inverse
    value = 1 / (1 / shifted + 1 / limit)

    def derivative(log_inverse_slope: float, limit_slope: float) -> Array:
        return value * (-log_inverse_slope / inverse / shifted**2 + limit_slope / limit**2)

    return np.log(value), derivative(-1 - start / limit, start), derivative(start / limit, rise)
