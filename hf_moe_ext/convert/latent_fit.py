"""Mathematics of the conversion to a latent width: pure functions of tensors, nothing of Transformers.

A standard block computes y = sum_e w_e D_e a_e(x) with a_e(x) = act(G_e x) * (U_e x); a DCCA block computes
y' = A sum_e w_e d_e act(g_e P x) * (u_e P x). Every function here solves one linear least-squares problem of that
approximation, and each is written as "the source's own weight plus a correction" where the correction is exactly zero at
latent width = hidden size. So a full-width fit reproduces the source whatever the calibration text was.

Symbols: x inputs, H hidden size, R latent size, F intermediate size, C second moment of the inputs, S importance.
"""

import torch
from torch import Tensor

# Relative to the mean of the diagonal: far below any signal, far above the rounding of float64.
_FLOOR = 1e-9
_RANK_TOLERANCE = 1e-12


def descend_subspace(second_moment: Tensor, importance: Tensor, latent_size: int) -> Tensor:
    """The subspace of the inputs that loses least of what the experts compute from them.

    Minimises trace(S (I - M P) C (I - M P)^T) over P [R, H] and M [H, R]: the rank-R approximation of the map with
    S = (map)^T (map), in the metric of the inputs it really sees. Closed form: P spans C^(-1/2) V, where V are the
    leading eigenvectors of C^(1/2) S C^(1/2).

    Args:
        second_moment: C [H, H], of the inputs; may be singular.
        importance: S [H, H], symmetric and positive semi-definite: how much an error of the input matters.
        latent_size: R.

    Returns:
        P [R, H] with orthonormal rows (any basis of the subspace serves; this one is well conditioned).

    Raises:
        ValueError: C is zero or not finite.
    """
    if not torch.isfinite(second_moment).all() or not second_moment.diagonal().sum() > 0:
        raise ValueError(
            "the layer's inputs on the calibration text are all zero or not finite; check the source's weights (NaN?) and "
            "that the text is not of padding alone"
        )
    values, vectors = torch.linalg.eigh(second_moment)
    # Directions the text never showed: kept invertible, so that what they leave free is decided by the importance.
    roots = values.clamp_min(_FLOOR * values.clamp_min(0).mean()).sqrt()
    half = (vectors * roots) @ vectors.T
    leading = leading_subspace(half @ importance @ half, latent_size)
    span = leading @ ((vectors / roots) @ vectors.T)
    # Rows of very different length would lose the short ones in the orthogonalisation.
    span = span / span.norm(dim=1, keepdim=True)
    return torch.linalg.qr(span.T).Q.T.contiguous()


def leading_subspace(moment: Tensor, size: int) -> Tensor:
    """Eigenvectors [size, H] of the largest eigenvalues of a symmetric matrix [H, H], largest first."""
    return torch.linalg.eigh(moment).eigenvectors[:, -size:].flip(1).T.contiguous()


def orthogonal_complement(descend: Tensor) -> Tensor:
    """Orthonormal rows [H - R, H] of everything outside the subspace of P [R, H]; no row at R = H."""
    return torch.linalg.qr(descend.T, mode="complete").Q[:, len(descend) :].T


def latent_input_weight(weight: Tensor, second_moment: Tensor, descend: Tensor, complement: Tensor) -> Tensor:
    """Least squares of one expert's pre-activations on its latent inputs.

    Minimises trace((W - w P) C (W - w P)^T) over w; as a correction of W P^T:
    w = W (P^T + Q^T (Q C P^T) (P C P^T)^-1), where Q is what P leaves out.

    Args:
        weight: W [F, H], the expert's first matrix (or its gate and up matrices stacked).
        second_moment: C [H, H] of this expert's inputs; may be singular.
        descend: P [R, H], orthonormal rows.
        complement: Q [H - R, H], see `orthogonal_complement`.

    Returns:
        w [F, R].
    """
    seen = second_moment @ descend.T
    # Of the latent directions that no input had nothing can be learnt: no correction there.
    inverse = torch.linalg.pinv(descend @ seen, rtol=_RANK_TOLERANCE, hermitian=True)
    return weight @ descend.T + (weight @ complement.T) @ ((complement @ seen) @ inverse)


def refit_output_weight(current: Tensor, residual: Tensor, gram: Tensor, ridge: float, fallback: Tensor) -> Tensor:
    """Least squares of the outputs on the activations that one expert's latent form really produces.

    Minimises sum_t |r_t - (B - B0) a_t|^2 + ridge |B - D|^2 over B, where r_t is what the current weights B0 of all
    experts leave of the target and a_t carries the router's weight; as a correction of B0:
    B = B0 + (sum_t r_t a_t^T - ridge (B0 - D)) (K + ridge I)^-1.

    Args:
        current: B0 [H, F].
        residual: sum_t r_t a_t^T [H, F].
        gram: K = sum_t a_t a_t^T [F, F].
        ridge: in units of K's diagonal; above 0.
        fallback: D [H, F], the source's own second matrix, which stands where there are no data.

    Returns:
        B [H, F].
    """
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    right = residual - ridge * (current - fallback)
    # Cholesky: symmetric and positive definite by construction.
    return current + torch.cholesky_solve(right.T, torch.linalg.cholesky(regular)).T


def svd_projections(gate_up_proj: Tensor, down_proj: Tensor, latent_size: int) -> tuple[Tensor, Tensor]:
    """The data-free baseline: singular subspaces of the stacked expert weights.

    Args:
        gate_up_proj: [E, 2F, H].
        down_proj: [E, H, F].
        latent_size: R.

    Returns:
        descend [R, H], the leading right singular vectors of all first matrices stacked, and ascend [H, R], the leading
        left singular vectors of all second matrices side by side.
    """
    # Eigenvectors of the H x H products: the stacked matrices have E * F rows.
    rows = sum(weight.T @ weight for weight in gate_up_proj)
    columns = sum(weight @ weight.T for weight in down_proj)
    return leading_subspace(rows, latent_size), leading_subspace(columns, latent_size).T.contiguous()
