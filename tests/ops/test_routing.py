"""Routing and the auxiliary losses against their loops."""

import pytest
import torch

from hf_moe_ext.ops.routing import (
    TokenGroups,
    choose_experts,
    expert_weights,
    load_balance_loss,
    router_sums,
    router_z_loss,
)
from support import naive


def _route(hidden, router, top_k, normalize):
    logits = hidden @ router.T
    index = choose_experts(logits, top_k)
    return logits, index, expert_weights(logits, index, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_routing_equals_the_loop(num_experts, top_k, normalize):
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    router = torch.randn(num_experts, 5, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(7, top_k, dtype=torch.float64)
    _, index, weights = _route(hidden, router, top_k, normalize)
    _, naive_index, naive_weights = naive.route(hidden, router, top_k, normalize)
    assert torch.equal(index, torch.as_tensor(naive_index))
    torch.testing.assert_close(weights, naive_weights, atol=1e-10, rtol=0)
    ours = torch.autograd.grad((weights * direction).sum(), (hidden, router))
    theirs = torch.autograd.grad((naive_weights * direction).sum(), (hidden, router))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_ties_go_to_the_lowest_expert():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert choose_experts(logits, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_the_loops(masked):
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    hidden = [torch.randn(6, 5, dtype=torch.float64) for _ in range(3)]
    routers = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    total, probs, indices, all_logits = None, [], [], []
    for h, router in zip(hidden, routers, strict=True):
        logits, index, _ = _route(h, router, 2, False)
        sums = router_sums(logits, index, TokenGroups(1, mask))
        total = sums if total is None else total + sums
        p, i, _ = naive.route(h, router, 2, False)
        probs.append(p)
        indices.append(torch.as_tensor(i))
        all_logits.append(h @ router.T)
    keep = torch.ones(6, dtype=torch.bool) if mask is None else mask
    for ours, theirs in (
        (
            load_balance_loss(total.counts, total.probabilities, total.tokens),
            naive.load_balance_loss(probs, indices, keep),
        ),
        (router_z_loss(total.squared_lse, total.tokens), naive.router_z_loss(all_logits, keep)),
    ):
        torch.testing.assert_close(ours[0], theirs, atol=1e-10, rtol=0)
        ours_grad = torch.autograd.grad(ours, routers, retain_graph=True)
        theirs_grad = torch.autograd.grad(theirs, routers, retain_graph=True)
        for one, other in zip(ours_grad, theirs_grad, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_loss_is_top_k_at_balance(top_k):
    logits = torch.zeros(8, 4)
    index = torch.stack([(torch.arange(8) + shift) % 4 for shift in range(top_k)], dim=1)
    sums = router_sums(logits, index)
    assert load_balance_loss(sums.counts, sums.probabilities, sums.tokens).item() == pytest.approx(top_k)


def test_a_batch_of_padding_alone_costs_nothing():
    sums = router_sums(
        torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.long), TokenGroups(1, torch.zeros(3, dtype=torch.bool))
    )
    assert load_balance_loss(sums.counts, sums.probabilities, sums.tokens).item() == 0
    assert router_z_loss(sums.squared_lse, sums.tokens).item() == 0
