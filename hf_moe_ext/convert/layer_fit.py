"""One MoE layer to the latent width: statistics of its calibration tokens, and the least-squares fits in order.

Holds one layer's tokens and one expert's matrices of statistics (2F x H and F x F) at a time, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_moe_ext.convert.latent_fit import (
    descend_subspace,
    latent_input_weight,
    leading_subspace,
    orthogonal_complement,
    refit_output_weight,
    svd_projections,
)

Activation = Callable[[Tensor], Tensor]
Method = Literal["data", "svd"]


@dataclass(frozen=True)
class GatedExperts:
    """Weights of a block's experts as Transformers stacks them.

    Attributes:
        gate_up_proj: [E, 2F, input], gate above up.
        down_proj: [E, output, F].
        activation: applied to the gate.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    activation: Activation

    def inner(self, expert: int, inputs: Tensor) -> Tensor:
        """act(G x) * (U x) of one expert: [tokens, input] -> [tokens, F]."""
        gate, up = (inputs @ self.gate_up_proj[expert].to(inputs.dtype).T).chunk(2, dim=-1)
        return self.activation(gate) * up


@dataclass(frozen=True)
class RoutedTokens:
    """What a block saw of the calibration text.

    Attributes:
        inputs: [tokens, H], rows that router and experts receive.
        ids: [tokens, k], experts chosen.
        weights: [tokens, k], the router's weights.
        targets: [tokens, H], what the block's output should be.
    """

    inputs: Tensor
    ids: Tensor
    weights: Tensor
    targets: Tensor

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Rows sent to one expert and their weights in float64; both [rows of the expert]."""
        rows, place = (self.ids == expert).nonzero(as_tuple=True)
        return rows, self.weights[rows, place].double()


@dataclass(frozen=True)
class LatentBlock:
    """Weights of a gated DCCA block, under the names its module gives them; all float64."""

    descend: Tensor
    ascend: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor

    def state(self) -> dict[str, Tensor]:
        """Parameter name below the block -> weight."""
        return {
            "descend.weight": self.descend,
            "ascend.weight": self.ascend,
            "experts.gate_up_proj": self.gate_up_proj,
            "experts.down_proj": self.down_proj,
        }


def fit_svd(experts: GatedExperts, latent_size: int) -> LatentBlock:
    """The data-free baseline: project all experts on the singular subspaces of their stacked weights."""
    gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    descend, ascend = svd_projections(gate_up, down, latent_size)
    return LatentBlock(descend, ascend, gate_up @ descend.T, ascend.T @ down)


def fit_data(
    tokens: RoutedTokens, experts: GatedExperts, latent_size: int, prior_tokens: float = 8.0, num_sweeps: int = 2
) -> LatentBlock:
    """Data-aware fit, in four closed-form steps.

    1. descend: the subspace that keeps the experts' pre-activations best (`descend_subspace`).
    2. gate and up of each expert: least squares of its own pre-activations on its own latent inputs.
    3. down: least squares of the block's output on the activations that step 2 really produces, expert after expert
       against what the others leave (Gauss-Seidel), so that it makes up for the errors of step 2.
    4. ascend: the principal subspace of what step 3 predicts; the experts' second matrices are projected on it.

    All errors count by the squared router weight with which they reach the output.

    Args:
        tokens: the calibration tokens.
        experts: the source's weights.
        latent_size: R.
        prior_tokens: how many average tokens an expert's fallback (statistics of all tokens; its own second matrix)
            weighs: it decides for an expert the text hardly uses and vanishes for the others.
        num_sweeps: passes over the experts in step 3.
    """
    inputs = tokens.inputs.double()
    # Per token of an expert, so that `prior_tokens` of it can be added to any expert's sum.
    squared = tokens.weights.double().square().sum(dim=1, keepdim=True)
    average = (inputs * squared).T @ inputs / tokens.ids.numel()
    descend = descend_subspace(average, _importance(tokens, experts), latent_size)
    latent = inputs @ descend.T
    complement = orthogonal_complement(descend)
    gate_up = torch.empty(*experts.gate_up_proj.shape[:2], latent_size, dtype=torch.float64, device=inputs.device)
    for expert, weight in enumerate(experts.gate_up_proj):
        rows, shares = tokens.of_expert(expert)
        own = inputs[rows]
        moment = (own * shares.square()[:, None]).T @ own + prior_tokens * average
        gate_up[expert] = latent_input_weight(weight.double(), moment, descend, complement)
    fitted = GatedExperts(gate_up, experts.down_proj, experts.activation)
    down, predicted = _fit_outputs(tokens, fitted, latent, prior_tokens, num_sweeps)
    ascend = leading_subspace(predicted.T @ predicted, latent_size).T.contiguous()
    return LatentBlock(descend, ascend, gate_up, ascend.T @ down)


def _importance(tokens: RoutedTokens, experts: GatedExperts) -> Tensor:
    """sum_e (sum of squared router weights of e) W_e^T W_e [H, H]: squared length of all pre-activations of an input."""
    width = experts.gate_up_proj.shape[2]
    total = torch.zeros(width, width, dtype=torch.float64, device=tokens.inputs.device)
    for expert, weight in enumerate(experts.gate_up_proj):
        first = weight.double()
        total += tokens.of_expert(expert)[1].square().sum() * (first.T @ first)
    return total


def _fit_outputs(
    tokens: RoutedTokens, experts: GatedExperts, latent: Tensor, prior_tokens: float, num_sweeps: int
) -> tuple[Tensor, Tensor]:
    """Step 3: second matrices [E, H, F] of full output width, and what they predict [tokens, H]."""
    source = experts.down_proj
    down = source.double().clone()
    predicted = torch.zeros_like(tokens.targets, dtype=torch.float64)
    squares = 0.0
    for expert in range(len(down)):
        rows, weight = tokens.of_expert(expert)
        weighted = weight[:, None] * experts.inner(expert, latent[rows])
        predicted.index_add_(0, rows, weighted @ down[expert].T)
        squares += float(weighted.square().sum())
    # Above 0 even where nothing is active, so that the fits below stay regular.
    ridge = max(prior_tokens * squares / (tokens.ids.numel() * source.shape[2]), torch.finfo(torch.float64).tiny ** 0.5)
    for _ in range(num_sweeps):
        for expert in range(len(down)):
            rows, weight = tokens.of_expert(expert)
            if len(rows) == 0:
                continue  # stays the source's own
            weighted = weight[:, None] * experts.inner(expert, latent[rows])
            left = tokens.targets[rows].double() - predicted[rows]
            refitted = refit_output_weight(
                down[expert], left.T @ weighted, weighted.T @ weighted, ridge, source[expert].double()
            )
            predicted.index_add_(0, rows, weighted @ (refitted - down[expert]).T)
            down[expert] = refitted
    return down, predicted
