"""Ludziejewski et al., arXiv 2502.05172: the joint law of active parameters, tokens and number of experts.

    L = a E^^delta N_act^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c

E^ saturates (``saturation``), E^(1) = E_s; natural logarithms. For each E it is m N^mu + k D^nu + c, so its optima are
closed forms. Two public notes print coefficients with flipped signs; these are the paper's.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, log
from typing import Any

import numpy as np

from hf_moe_ext.scaling.laws.card import (
    OPTIMAL_SPARSITY,
    TOKENS_PER_ACTIVE,
    Answer,
    Counts,
    FittedRange,
    Flag,
    Law,
    LawCard,
    expert_ratio,
    not_covered,
)
from hf_moe_ext.scaling.laws.layout import IdealLayout
from hf_moe_ext.scaling.laws.saturation import saturate
from hf_moe_ext.scaling.laws.search import find_crossing, minimize_scale
from hf_moe_ext.scaling.shape import MoeShape

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
E_START, E_MAX, IRREDUCIBLE = 2.0732, 290.4521, 1.3637
VOCAB_SIZE = 50_257


@dataclass(frozen=True)
class PerExpertForm:
    """L = m N^mu + k D^nu + c for one number of experts."""

    m: float
    mu: float
    k: float
    nu: float

    def loss(self, active_parameters: Any, num_tokens: Any) -> Any:
        """L(N_act, D)."""
        return self.m * active_parameters**self.mu + self.k * num_tokens**self.nu + IRREDUCIBLE


# As printed beside the law.
PRINTED_FORMS = {
    1: PerExpertForm(30.364, -0.1817, 53.984, -0.1965),
    2: PerExpertForm(27.798, -0.1780, 66.840, -0.2065),
    4: PerExpertForm(24.846, -0.1731, 87.702, -0.2192),
    8: PerExpertForm(21.833, -0.1676, 119.913, -0.2338),
    16: PerExpertForm(19.016, -0.1617, 167.507, -0.2494),
    32: PerExpertForm(16.542, -0.1557, 234.673, -0.2652),
}


def effective_experts(num_experts: Any) -> Any:
    """E^."""
    return saturate(num_experts - 1, E_START, E_MAX)


def form(num_experts: Any) -> PerExpertForm:
    """The law at one E; 1 is a dense model."""
    if not np.all(np.asarray(num_experts) >= 1):
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    effective = effective_experts(num_experts)
    log_effective = np.log(effective)
    return PerExpertForm(
        A * effective**DELTA, ALPHA + GAMMA * log_effective, B * effective**OMEGA, BETA + ZETA * log_effective
    )


def loss(active_parameters: Any, num_tokens: Any, num_experts: Any) -> Any:
    """L(N_act, D, E); N_act counts both embeddings."""
    return form(num_experts).loss(active_parameters, num_tokens)


@dataclass(frozen=True)
class Optimum:
    """The best model of a budget.

    Attributes:
        active_parameters: N_act, embeddings in.
        num_tokens: D.
        loss: L.
        hidden_size: width of its ``IdealLayout``, where one was asked for.
    """

    active_parameters: float
    num_tokens: float
    loss: float
    hidden_size: float | None = None


def optimum(budget_flops: float, num_experts: float) -> Optimum:
    """6 N D = F: N* = g (F/6)^(B/(A+B)), g = (A m / (B k))^(1/(A+B)), with A = -mu and B = -nu."""
    at = form(num_experts)
    a, b = -at.mu, -at.nu
    active = (a * at.m / (b * at.k)) ** (1 / (a + b)) * (budget_flops / 6) ** (b / (a + b))
    tokens = budget_flops / 6 / active
    return Optimum(float(active), float(tokens), float(at.loss(active, tokens)))


def constrained_optimum(
    budget_flops: float,
    num_experts: float,
    max_values: float = inf,
    cached_tokens: float = 0,
    inference_tokens: float = 0,
) -> Optimum | None:
    """The best ``IdealLayout`` (n = heads = d / 64, width 3 d, V = 50,257) under the paper's constraint sets.

    Args:
        budget_flops: 6 N_act D + 2 N_act D_inf = F.
        num_experts: E.
        max_values: M: N_total + 2 T n d must not exceed it; memory in values, not bytes.
        cached_tokens: T, tokens whose keys and values are held.
        inference_tokens: D_inf.

    Returns:
        None where nothing fits.
    """

    def model(width: float) -> IdealLayout:
        return IdealLayout(width, num_experts, ffn_ratio=3, vocab_size=VOCAB_SIZE)

    def held(width: float) -> float:
        return model(width).total_parameters + 2 * cached_tokens * model(width).num_layers * width

    def tokens(width: float) -> float:
        active = model(width).active_parameters
        return (budget_flops - 2 * active * inference_tokens) / (6 * active)

    def value(width: float) -> float:
        return inf if tokens(width) <= 0 else float(loss(model(width).active_parameters, tokens(width), num_experts))

    low, high = 1.0, 1e6
    if max_values < inf:
        # Growing in d, so falling in 1 / d.
        high = (
            1 / find_crossing(lambda inverse: held(1 / inverse), max_values, 1 / high, 1 / low)
            if held(low) < max_values
            else 0
        )
    if high < low or tokens(low) <= 0:
        return None
    width = minimize_scale(value, low, high)
    return Optimum(model(width).active_parameters, tokens(width), value(width), width)


@lru_cache(maxsize=65536)
def dense_budget(target_loss: float) -> float:
    """Training FLOPs at which the compute-optimal dense model has this loss; inf if none has."""
    return find_crossing(lambda budget: optimum(budget, 1).loss, target_loss, 1e10, 1e40)


def ideal_multiplier(budget_flops: float, num_experts: float) -> float:
    """C_dense / C at equal optimal loss."""
    return dense_budget(optimum(budget_flops, num_experts).loss) / budget_flops


def learning_rate(active_non_embedding_parameters: float, num_experts: float) -> float:
    """exp(8.39 - 0.81 ln N - 0.25 ln E), N active without embeddings."""
    return exp(8.39 - 0.81 * log(active_non_embedding_parameters) - 0.25 * log(num_experts))


class JointLaw(Law):
    """The global form."""

    card = LawCard(
        name="joint",
        title="Ludziejewski et al.: joint law of active parameters, tokens and experts",
        source="arXiv 2502.05172",
        provenance="paper",
        variables={
            "active_parameters": "N_act, one expert of E, both embeddings in",
            "num_tokens": "D, training tokens",
            "num_experts": "E, experts of which one is used (E / K for others)",
            "budget_flops": "C = 6 N_act D",
            "tokens_per_parameter": "D / N_act",
        },
        counting="N_act with input and output embedding, without router; C = 6 N_act D; nats per GPT-2 token",
        fitted=(
            FittedRange("active_parameters", 0, 2.7e9),
            FittedRange("num_experts", 1, 32),
            FittedRange("tokens_per_parameter", 1, 400),
        ),
        error="RMSE 0.0062 fit, 0.0039 on the 30 best held-out runs, at most 0.018",
        caveat="Switch top-1 with dropped tokens, no granularity: lower multipliers than dropless fine-grained models",
    )

    def count(self, shape: MoeShape, num_tokens: float, context_length: int | None = None) -> Counts:
        """N_act with both embeddings even where they are one tensor; E = E / K."""
        count, ratio = shape.parameters, expert_ratio(shape)
        active = count.active() - count.router - count.norms
        active += count.input_embedding if shape.tied_embeddings else 0
        flags = list(not_covered(shape))
        if any(layer.top_k > 1 for layer in shape.moe_layers):
            flags.append(Flag("inferred", f"the law knows top-1 routing only; E / K = {ratio:.4g} stands for E"))
        values = {
            "active_parameters": float(active),
            "num_tokens": float(num_tokens),
            "num_experts": ratio,
            "budget_flops": 6.0 * active * num_tokens,
            "tokens_per_parameter": num_tokens / active,
        }
        return Counts(self.card.name, values, tuple(flags))

    def compute_multiplier(self, counts: Counts) -> Answer:
        """Against the compute-optimal dense model of equal loss."""
        return self.compare_with_dense(
            counts,
            lambda own: float(loss(own["active_parameters"], own["num_tokens"], own["num_experts"])),
            dense_budget,
        )

    def tokens_per_active_parameter(self, budget_flops: float, expert_ratio: float) -> Answer:
        """D* / N_act*."""
        best = optimum(budget_flops, expert_ratio)
        values = {"active_parameters": best.active_parameters, "num_experts": expert_ratio}
        flags = self.check(Counts(self.card.name, values))
        value = best.num_tokens / best.active_parameters
        return Answer(self.card.name, TOKENS_PER_ACTIVE, value, flags, {"loss": best.loss, **values})

    def optimal_sparsity(self, total_parameters: float, budget_flops: float) -> Answer:
        """The E of 1 to 32 (powers of two) of lowest loss among models of at most N_total parameters."""
        found = {e: constrained_optimum(budget_flops, e, total_parameters) for e in PRINTED_FORMS}
        fitting = {e: best.loss for e, best in found.items() if best is not None}
        if not fitting:
            return Answer(self.card.name, OPTIMAL_SPARSITY, None, (self._silent(f"{total_parameters:.3g} parameters"),))
        best = min(fitting, key=lambda e: fitting[e])
        flags = () if best < 32 else (Flag("outside_range", "the best E is the largest fitted, 32; it may lie beyond"),)
        return Answer(self.card.name, OPTIMAL_SPARSITY, 1 - 1 / best, flags)
