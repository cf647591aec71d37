"""Initial scales of a DCCA block that keep what a standard block of the same configuration does at birth.

A standard block draws every matrix with one standard deviation s (``initializer_range``). Its input has unit root mean
square (RMS), coming from an RMSNorm, so an expert's pre-activations have standard deviation t = s sqrt(H) and each
coordinate of its output has RMS s sqrt(I) m, m the RMS of act(a) b for independent a, b ~ N(0, t^2).

The rule: descend and ascend keep RMS (1/sqrt(fan_in)), the latent experts see the same pre-activations (t), and their
last matrix is scaled so that the output's RMS is the standard one. Then the output, and with it the router's gradient
(the routing weights multiply outputs), starts at the standard scale. The gradient that passes back to the input does so
too for gated experts. For un-gated ones it is smaller by at most sqrt(2): a product of two factors is of second degree
in its input and one activation of first, so equal outputs have unequal slopes; no choice of scales closes that.
With a norm before ascend, which sets the latent's RMS to 1, ascend takes up the standard output's RMS instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

_DRAWS = 4096


@dataclass(frozen=True)
class InitialScales:
    """Standard deviations of the normal distributions a block's matrices are drawn from."""

    descend: float
    up: float
    down: float
    ascend: float


def activation_rms(act: Callable[[Tensor], Tensor], std: float) -> float:
    """Root mean square of ``act(a)`` for a ~ N(0, std^2), by the trapezoidal rule."""
    grid = torch.linspace(-9.0, 9.0, 9001, dtype=torch.float64, device="cpu")
    density = torch.exp(-(grid**2) / 2)
    values = act(grid * std) ** 2
    return float(torch.sqrt((values * density).sum() / density.sum()))


@lru_cache
def combined_weight_norm(num_experts: int, top_k: int, logit_std: float, normalized: bool) -> float:
    """Root of the mean sum of squared routing weights, over routers whose logits are N(0, logit_std^2).

    Drawn from a generator of its own with a fixed seed: the same value everywhere, and the caller's random state stays.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    logits = logit_std * torch.randn(_DRAWS, num_experts, dtype=torch.float64, device="cpu", generator=generator)
    weights = torch.softmax(logits, dim=-1).topk(top_k, dim=-1).values
    if normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return float((weights**2).sum(dim=-1).mean().sqrt())


def initial_scales(
    *,
    hidden_size: float,
    intermediate_size: float,
    act: Callable[[Tensor], Tensor],
    latent_size: float,
    expert_intermediate_size: float,
    expert_act: Callable[[Tensor], Tensor],
    gated: bool,
    initializer_range: float,
    combined_norm: float | None = None,
    norm_eps: float = 0.0,
) -> InitialScales:
    """The rule of this module.

    Args:
        hidden_size: H.
        intermediate_size: I, of the standard expert (gated, with ``act``).
        act: activation of the standard expert.
        latent_size: R.
        expert_intermediate_size: F.
        expert_act: activation of the latent experts.
        gated: whether the latent experts are gated.
        initializer_range: s.
        combined_norm: ``combined_weight_norm`` if a norm stands before ascend, else None.
        norm_eps: epsilon of that norm; the combined latent starts small enough for it to count.
    """
    preactivation = initializer_range * sqrt(hidden_size)
    inner_standard = preactivation * activation_rms(act, preactivation)
    inner = activation_rms(expert_act, preactivation) * (preactivation if gated else 1.0)
    output = initializer_range * sqrt(intermediate_size) * inner_standard
    down = output / (sqrt(expert_intermediate_size) * inner) if inner else 0.0  # initializer_range may be 0
    normed = 1.0 if combined_norm is None else sqrt((output * combined_norm) ** 2 + norm_eps)
    ascend = normed / sqrt(latent_size)
    return InitialScales(descend=1 / sqrt(hidden_size), up=preactivation / sqrt(latent_size), down=down, ascend=ascend)
