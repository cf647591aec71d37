"""Every path of both forwards against the loop, on awkward sizes and routings."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_moe_ext.ders import forward, fused_low_rank
from hf_moe_ext.ders.forward import choose_path
from support.ders_experts import (
    FORMS,
    HIDDEN,
    MORE_FORMS,
    PLAIN_FORMS,
    assert_same,
    every_path,
    gradients,
    make_experts,
    naive,
    paths,
    route,
    run,
)

# tokens, top_k, routing.
CASES = [(1, 1, "any"), (1, 4, "any"), (7, 2, "idle"), (9, 4, "any"), (8, 3, "sentinels"), (5, 2, "nobody")]


def assert_the_loop(module, path, tokens, top_k, routing):
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(tokens, top_k, routing)
    weights.requires_grad_()
    output, expected = (
        f(module, *a) for f, a in ((run, (path, hidden, index, weights)), (naive, (hidden, index, weights)))
    )
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    found = gradients(module, output, hidden, weights)
    assert None not in found.values()
    assert_same(found, gradients(module, expected, hidden, weights), atol=1e-10)


@pytest.mark.parametrize(("tokens", "top_k", "routing"), CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("form", "path"), every_path(PLAIN_FORMS))
def test_every_path_equals_the_loop_with_all_gradients(form, path, gated, bias, tokens, top_k, routing):
    assert_the_loop(make_experts(form, gated, bias), path, tokens, top_k, routing)


@pytest.mark.parametrize(("tokens", "top_k", "routing"), [(1, 4, "any"), (7, 2, "idle"), (8, 3, "sentinels")])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("form", "path"), every_path(MORE_FORMS))
def test_other_forms_equal_the_loop_with_all_gradients(form, path, gated, tokens, top_k, routing):
    assert_the_loop(make_experts(form, gated), path, tokens, top_k, routing)


@pytest.mark.parametrize("form", FORMS)
def test_paths_agree_to_1e_12_in_float64_and_1e_5_in_float32(form):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        torch.manual_seed(1)
        module = make_experts(form, dtype=dtype, hidden_dim=24, intermediate_dim=20)
        hidden = (torch.randn(30, 24, dtype=dtype) / 5).requires_grad_()
        index, weights = route(30, 2, "sentinels")
        weights = weights.to(dtype).requires_grad_()
        outputs = {path: run(module, path, hidden, index, weights) for path in paths(form)}
        found = {path: gradients(module, output, hidden, weights) for path, output in outputs.items()}
        for path, output in outputs.items():
            scale = outputs["materialised"].abs().max()
            assert (output - outputs["materialised"]).abs().max() <= bound * scale, path
            for name, gradient in found[path].items():
                wanted = found["materialised"][name]
                assert (gradient - wanted).abs().max() <= bound * wanted.abs().max(), (path, name)


@pytest.mark.parametrize("path", ["dense", "grouped", "gathered", "pairwise"])
def test_low_rank_gradcheck(path):
    module = make_experts(hidden_dim=3, intermediate_dim=2, num_experts=2, rank=1)
    index, weights = route(3, 2, experts=2)
    index[0, 0] = 2
    hidden = torch.randn(3, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights)] + list(module.parameters())
    assert torch.autograd.gradcheck(lambda *_: run(module, path, hidden, index, weights), leaves)


@pytest.mark.parametrize("form", ["sparse", "quantized"])
def test_decoded_gradcheck(form):
    module = make_experts(form, hidden_dim=3, intermediate_dim=2, num_experts=2)
    index, weights = route(3, 2, experts=2)
    hidden = torch.randn(3, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights)] + list(module.parameters())
    assert torch.autograd.gradcheck(lambda *_: run(module, "grouped", hidden, index, weights), leaves)


@pytest.mark.parametrize("path", ["materialised", "dense", "grouped", "gathered", "pairwise"])
def test_half_precision_sums_in_float32(path):
    module = make_experts(dtype=torch.bfloat16, hidden_dim=32, intermediate_dim=48, num_experts=8)
    index, weights = route(20, 8, experts=8)
    hidden = torch.randn(20, 32, dtype=torch.bfloat16)
    output = run(module, path, hidden, index, weights.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    expected = naive(module.double(), hidden, index, weights.to(torch.bfloat16))
    # Roundings of 2^-9 in a few products of standard deviation about 1; a bfloat16 sum of 8 experts would double it.
    assert (output.double() - expected).norm() < 2**-7 * expected.norm()


def test_dense_serves_few_bottlenecks_and_what_the_grouped_kernel_cannot():
    assert choose_path(8, 4, torch.float32) == "dense"
    limit = forward.DENSE_LIMIT
    assert choose_path(limit + 1, 1, torch.float32) == "grouped"
    assert choose_path(limit + 1, 1, torch.float64) == "dense"


@pytest.mark.parametrize("path", ["dense", "gathered", "pairwise"])
def test_paths_of_low_rank_deltas_are_refused_without_them(path):
    index, weights = route(3, 1)
    with pytest.raises(ValueError, match=f"path '{path}' is for low-rank deltas only"):
        run(make_experts("sparse"), path, torch.randn(3, HIDDEN, dtype=torch.float64), index, weights)


@pytest.mark.parametrize(
    ("tokens", "top_k", "grad", "path"),
    [
        (1, 4, False, "pairwise"),
        (2, 2, False, "gathered"),
        (2, 3, False, None),
        (1, 4, True, None),
        (0, 2, False, None),
    ],
)
def test_few_pairs_have_a_way_of_their_own_where_nothing_trains(tokens, top_k, grad, path, monkeypatch):
    calls = []
    for name in ("gathered", "pairwise"):
        way = getattr(fused_low_rank, name)
        monkeypatch.setattr(forward, name, lambda *a, name=name, way=way: calls.append(name) or way(*a))
    module = make_experts()
    hidden, index, weights = torch.randn(tokens, HIDDEN, dtype=torch.float64), *route(max(tokens, 1), top_k)
    with torch.set_grad_enabled(grad):
        output = module(hidden, index[:tokens], weights[:tokens])
    assert output.shape == hidden.shape
    assert calls == ([] if path is None else [path])


def test_a_fake_token_is_not_asked_for_its_experts():
    """Tools that run a model on tensors without numbers, to count its memory."""
    module, (index, weights) = make_experts(), route(1, 2)
    hidden = torch.randn(1, HIDDEN, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        output = module(*(mode.from_tensor(tensor) for tensor in (hidden, index, weights)))
    assert output.shape == hidden.shape
