"""The fit of one layer against loops that read like the formula."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_moe_ext.convert.layer_fit import GatedExperts, LatentBlock, RoutedTokens, fit_data, fit_svd

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 4, 16, 8, 200, 2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts() -> GatedExperts:
    return GatedExperts(draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=0), draw(EXPERTS, HIDDEN, WIDTH, seed=1), silu)


def naive_block(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_e w_e D_e act(G_e x) * (U_e x), token by token."""
    rows = []
    for t in range(len(x)):
        total = torch.zeros(down.shape[1], dtype=x.dtype)
        for i, expert in enumerate(ids[t].tolist()):
            gate, up = gate_up[expert].chunk(2)
            total = total + weights[t, i] * (down[expert] @ (silu(gate @ x[t]) * (up @ x[t])))
        rows.append(total)
    return torch.stack(rows)


def naive_latent_block(x: Tensor, ids: Tensor, weights: Tensor, block: LatentBlock) -> Tensor:
    return naive_block(x @ block.descend.T, ids, weights, block.gate_up_proj, block.down_proj) @ block.ascend.T


def tokens(source: GatedExperts, chosen: int = EXPERTS, seed: int = 2) -> RoutedTokens:
    """Tokens of correlated inputs; only the first `chosen` experts are used."""
    x = draw(TOKENS, HIDDEN, seed=seed) * torch.logspace(0, -2, HIDDEN, dtype=torch.float64)
    x = x @ draw(HIDDEN, HIDDEN, seed=9)
    weights, ids = draw(TOKENS, chosen, seed=seed + 1).softmax(dim=-1).topk(TOP_K)
    return RoutedTokens(x, ids, weights, naive_block(x, ids, weights, source.gate_up_proj, source.down_proj))


def relative_error(block: LatentBlock, given: RoutedTokens) -> float:
    found = naive_latent_block(given.inputs, given.ids, given.weights, block)
    return float((found - given.targets).square().sum() / given.targets.square().sum())


@pytest.mark.parametrize("chosen", [EXPERTS, EXPERTS - 1])
@pytest.mark.parametrize("method", ["data", "svd"])
def test_full_width_is_the_source_for_all_experts_and_all_inputs(method: str, chosen: int) -> None:
    source = experts()
    block = fit_data(tokens(source, chosen), source, HIDDEN) if method == "data" else fit_svd(source, HIDDEN)
    elsewhere = tokens(source, seed=5)  # uses every expert
    found = naive_latent_block(elsewhere.inputs, elsewhere.ids, elsewhere.weights, block)
    torch.testing.assert_close(found, elsewhere.targets, rtol=1e-10, atol=1e-10 * float(elsewhere.targets.abs().max()))


def test_error_falls_with_the_width_and_beats_svd() -> None:
    source = experts()
    given, elsewhere = tokens(source), tokens(source, seed=5)
    errors = [relative_error(fit_data(given, source, size), elsewhere) for size in (4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    for size, error in zip((4, 8, 12), errors, strict=False):
        assert error < 0.9 * relative_error(fit_svd(source, size), elsewhere)


def test_outputs_converge_to_the_joint_least_squares() -> None:
    """Step 3 goes expert after expert; the twin solves for all experts' second matrices at once."""
    source, size = experts(), 8
    given = tokens(source)
    block = fit_data(given, source, size, prior_tokens=1e-9, num_sweeps=200)
    latent = given.inputs @ block.descend.T
    features = torch.zeros(TOKENS, EXPERTS * WIDTH, dtype=torch.float64)
    for t in range(TOKENS):
        for i, expert in enumerate(given.ids[t].tolist()):
            gate, up = block.gate_up_proj[expert].chunk(2)
            active = silu(gate @ latent[t]) * (up @ latent[t])
            features[t, expert * WIDTH : (expert + 1) * WIDTH] = given.weights[t, i] * active
    joint = features @ torch.linalg.lstsq(features, given.targets).solution
    left = torch.linalg.svd(joint.T).U[:, :size]
    found = naive_latent_block(given.inputs, given.ids, given.weights, block)
    torch.testing.assert_close(found, joint @ left @ left.T, rtol=0, atol=1e-5 * float(joint.abs().max()))


def test_targets_are_what_is_fitted_not_the_source_outputs() -> None:
    source = experts()
    given = tokens(source)
    shifted = RoutedTokens(given.inputs, given.ids, given.weights, 1.5 * given.targets)
    assert relative_error(fit_data(shifted, source, 12), shifted) < 0.5 * relative_error(
        fit_data(given, source, 12), shifted
    )


def test_a_rarely_used_expert_is_not_fitted_to_its_few_tokens_alone() -> None:
    source = experts()
    given = tokens(source)
    ids = given.ids.clone()
    ids[6:][ids[6:] == 3] = 2
    ids[:6, 0] = 3  # six tokens, fewer than the inner width
    weights = (source.gate_up_proj, source.down_proj)
    rare = RoutedTokens(given.inputs, ids, given.weights, naive_block(given.inputs, ids, given.weights, *weights))
    only = (given.inputs, torch.full((TOKENS, 1), 3), torch.ones(TOKENS, 1).double())
    everywhere = RoutedTokens(*only, naive_block(*only, *weights))
    overfitted = relative_error(fit_data(rare, source, 8, prior_tokens=1e-6), everywhere)
    assert relative_error(fit_data(rare, source, 8), everywhere) < 0.95 * overfitted


def test_order_of_experts_does_not_matter_to_what_is_fitted_first() -> None:
    source = experts()
    given = tokens(source)
    order = torch.tensor([2, 0, 3, 1])
    turned = GatedExperts(source.gate_up_proj[order], source.down_proj[order], silu)
    ids = torch.argsort(order)[given.ids]
    one = fit_data(given, source, 8)
    two = fit_data(RoutedTokens(given.inputs, ids, given.weights, given.targets), turned, 8)
    seen = one.gate_up_proj[order] @ one.descend
    torch.testing.assert_close(two.gate_up_proj @ two.descend, seen, rtol=0, atol=1e-9 * float(seen.abs().max()))
