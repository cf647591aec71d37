"""The closed forms against solvers that see the samples."""

import pytest
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

HIDDEN, WIDTH, LATENT, TOKENS = 12, 10, 5, 60


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int = TOKENS) -> Tensor:
    """Correlated inputs of very different variances."""
    return draw(tokens, HIDDEN, seed=1) * torch.logspace(0, -3, HIDDEN, dtype=torch.float64) @ draw(HIDDEN, HIDDEN)


def orthonormal(rows: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(draw(HIDDEN, rows, seed=seed)).Q.T


def fit(weight: Tensor, second_moment: Tensor, subspace: Tensor) -> Tensor:
    return latent_input_weight(weight, second_moment, subspace, orthogonal_complement(subspace))


def loss(subspace: Tensor, weight: Tensor, x: Tensor) -> float:
    """Best squared error of ``weight @ x`` from the subspace's coordinates alone, by a solver."""
    latent = x @ subspace.T
    solution = torch.linalg.lstsq(latent, x @ weight.T, driver="gelsd").solution
    return float((x @ weight.T - latent @ solution).square().sum())


def test_descend_subspace_is_the_best_of_its_size() -> None:
    weight, x = draw(WIDTH, HIDDEN, seed=2), inputs()
    subspace = descend_subspace(x.T @ x, weight.T @ weight, LATENT)
    torch.testing.assert_close(subspace @ subspace.T, torch.eye(LATENT, dtype=torch.float64), rtol=0, atol=1e-10)
    # Eckart and Young: no rank-R map comes closer to W x on these samples than its leading singular vectors.
    best = torch.linalg.svdvals(weight @ x.T)[LATENT:].square().sum()
    assert loss(subspace, weight, x) == pytest.approx(float(best), rel=1e-6)
    others = [loss(orthonormal(LATENT, seed), weight, x) for seed in range(20)]
    blind = loss(leading_subspace(weight.T @ weight, LATENT), weight, x)
    assert loss(subspace, weight, x) < 0.9 * min(*others, blind)


def test_descend_subspace_of_fewer_samples_than_dimensions() -> None:
    x = inputs(tokens=LATENT - 1)
    subspace = descend_subspace(x.T @ x, torch.eye(HIDDEN, dtype=torch.float64), LATENT)
    assert loss(subspace, torch.eye(HIDDEN, dtype=torch.float64), x) < 1e-12 * float(x.square().sum())
    torch.testing.assert_close(subspace @ subspace.T, torch.eye(LATENT, dtype=torch.float64), rtol=0, atol=1e-10)


def test_latent_input_weight_is_least_squares() -> None:
    weight, x, subspace = draw(WIDTH, HIDDEN, seed=2), inputs(), orthonormal(LATENT)
    naive = torch.linalg.lstsq(x @ subspace.T, x @ weight.T).solution.T
    torch.testing.assert_close(fit(weight, x.T @ x, subspace), naive, rtol=1e-10, atol=1e-10)


def test_latent_input_weight_at_full_width_does_not_depend_on_the_data() -> None:
    weight, rotation = draw(WIDTH, HIDDEN, seed=2), orthonormal(HIDDEN)
    x = inputs(tokens=HIDDEN + 1)
    found = fit(weight, x.T @ x, rotation)
    torch.testing.assert_close(found @ rotation, weight, rtol=0, atol=1e-10)


def test_latent_input_weight_of_fewer_samples_than_dimensions_still_reproduces_them() -> None:
    weight, x, subspace = draw(WIDTH, HIDDEN, seed=2), draw(LATENT - 2, HIDDEN, seed=1), orthonormal(LATENT)
    found = fit(weight, x.T @ x, subspace)
    torch.testing.assert_close(x @ subspace.T @ found.T, x @ weight.T, rtol=0, atol=1e-10)


def test_refit_output_weight_is_ridge_regression() -> None:
    current, fallback = draw(HIDDEN, WIDTH, seed=4), draw(HIDDEN, WIDTH, seed=5)
    active, wanted, ridge = draw(TOKENS, WIDTH, seed=6), draw(TOKENS, HIDDEN, seed=7), 0.7
    residual = wanted - active @ current.T
    found = refit_output_weight(current, residual.T @ active, active.T @ active, ridge, fallback)
    # The penalty as further samples: sqrt(ridge) times each unit vector should give sqrt(ridge) times D.
    unit = ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)
    naive = torch.linalg.lstsq(torch.cat([active, unit]), torch.cat([wanted, unit @ fallback.T])).solution.T
    torch.testing.assert_close(found, naive, rtol=0, atol=1e-10)


def test_svd_projections_are_singular_vectors_of_the_stacks() -> None:
    gate_up, down = draw(3, 2 * WIDTH, HIDDEN), draw(3, HIDDEN, WIDTH, seed=1)
    descend, ascend = svd_projections(gate_up, down, LATENT)
    right = torch.linalg.svd(gate_up.flatten(0, 1)).Vh[:LATENT]
    left = torch.linalg.svd(torch.cat(list(down), dim=1)).U[:, :LATENT]
    torch.testing.assert_close(descend.T @ descend, right.T @ right, rtol=0, atol=1e-10)
    torch.testing.assert_close(ascend @ ascend.T, left @ left.T, rtol=0, atol=1e-10)
