"""Routing and the auxiliary losses against their loops."""

import pytest
import torch

from hf_moe_ext.ops.routing import (
    TokenGroups,
    choose_experts,
    expert_weights,
    load_balance_loss,
    router_logits,
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


def _logits_and_gradients(rows, router, direction, call=router_logits):
    rows, router = rows.clone().requires_grad_(), router.clone().requires_grad_()
    logits = call(rows, router)
    return logits, *torch.autograd.grad(logits, (rows, router), direction.to(logits.dtype))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_router_logits_are_wide_and_their_gradients_round_only_at_the_end(rows_dtype, router_dtype, autocast):
    rows, router = torch.randn(7, 5).to(rows_dtype), torch.randn(4, 5).to(router_dtype)
    direction = torch.randn(7, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # around the backward too
        ours = _logits_and_gradients(rows, router, direction)
    wide = torch.float64 if torch.float64 in (rows_dtype, router_dtype) else torch.float32
    assert [value.dtype for value in ours] == [wide, rows_dtype, router_dtype]
    theirs = _logits_and_gradients(rows.double(), router.double(), direction, torch.nn.functional.linear)
    atol = {torch.float64: 1e-10, torch.float32: 1e-5}
    for one, other in zip(ours, theirs, strict=True):
        # A gradient in half precision is the exact one, rounded once.
        rtol = 0 if one.dtype in atol else torch.finfo(one.dtype).eps
        torch.testing.assert_close(one.double(), other, atol=atol.get(one.dtype, 1e-5), rtol=rtol)


def test_router_logits_keep_no_wide_copy_of_the_rows():
    rows = torch.randn(7, 5).bfloat16().requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router_logits(rows, torch.randn(4, 5, requires_grad=True))
    assert {(tuple(t.shape), t.dtype) for t in kept} == {((7, 5), torch.bfloat16), ((4, 5), torch.float32)}


def test_router_logits_compile_whole():
    rows, router, direction = torch.randn(7, 5).bfloat16(), torch.randn(4, 5), torch.randn(7, 4)
    compiled = torch.compile(router_logits, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        _logits_and_gradients(rows, router, direction, compiled),
        _logits_and_gradients(rows, router, direction),
        strict=True,
    ):
        # A gradient in bfloat16 may round the other way when its products are summed in another order.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=torch.finfo(one.dtype).eps)


def test_router_logits_of_frozen_rows_or_a_frozen_router():
    rows, router = torch.randn(7, 5).bfloat16(), torch.randn(4, 5)
    for trained in (rows, router):
        trained.requires_grad_()
        router_logits(rows, router).sum().backward()
        assert [t.grad is not None for t in (rows, router)] == [trained is rows, trained is router]
        trained.requires_grad_(False).grad = None
