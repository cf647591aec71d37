"""Formulas known from one secondary source each, unverified: for looking up, not among the laws a planner asks.

Zhao et al. 2509.23678 (S is there the share of shared experts), Frantar et al. 2309.08520 (weight sparsity, T5 on C4),
Hunyuan-Large (its own budget formula).
"""

from typing import Any


def zhao_loss(
    total_parameters: Any, num_tokens: Any, active_parameters: Any, granularity: Any, shared_ratio: Any
) -> Any:
    """(eG + f/G + mS^2 + nS)(1/N^al + k/N_a^al + h N_a/N) + a/N^al + b/D^be + c/N_a^al + eps."""
    e, f, m, n, k, h = 0.1577, 7.2446, 5.1395, -3.2363, 0.0013, 0.0450
    a, al, b, be, c, eps = 38.051, 0.2383, 27129.05, 0.4694, 31.096, 1.8182
    size, active = total_parameters**-al, active_parameters**-al
    layout = e * granularity + f / granularity + m * shared_ratio**2 + n * shared_ratio
    scale = size + k * active + h * active_parameters / total_parameters
    return layout * scale + a * size + b / num_tokens**be + c * active + eps


def zhao_best_layout() -> tuple[float, float]:
    """G* = sqrt(f/e) and S* = -n/(2m)."""
    return (7.2446 / 0.1577) ** 0.5, 3.2363 / (2 * 5.1395)


def frantar_loss(sparsity: Any, nonzero_parameters: Any, num_tokens: Any) -> Any:
    """(16.8 (1-S)^.722 + 45) N_nz^-.245 + (6.9e8/D)^.203 + .651."""
    return (16.8 * (1 - sparsity) ** 0.722 + 45) * nonzero_parameters**-0.245 + (6.9e8 / num_tokens) ** 0.203 + 0.651


def hunyuan_training_flops(active_parameters: float, num_tokens: float) -> float:
    """C = 9.59 N_a D + 2.3e8 D."""
    return 9.59 * active_parameters * num_tokens + 2.3e8 * num_tokens


def hunyuan_active_parameters(budget_flops: float) -> float:
    """N_a* = 5.9e-3 C^0.5305."""
    return 5.9e-3 * budget_flops**0.5305
