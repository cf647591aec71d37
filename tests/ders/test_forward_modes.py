"""Experts under activation checkpointing, a compiler and autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.ders_experts import (
    FORMS,
    HIDDEN,
    PLAIN_FORMS,
    assert_same,
    gradients,
    make_experts,
    naive,
    paths,
    route,
    run,
)


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_changes_nothing(form, forward_path):
    module = make_experts(form, forward_path=forward_path)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    weights.requires_grad_()
    plain = module(hidden, index, weights)
    again = checkpoint(module, hidden, index, weights, use_reentrant=False)
    assert torch.equal(again, plain)
    assert_same(gradients(module, again, hidden, weights), gradients(module, plain, hidden, weights), atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_a_decoding_step_compiles_in_one_graph(grad):
    module = make_experts("low_rank_each")
    hidden, (index, weights) = torch.randn(1, HIDDEN, dtype=torch.float64), route(1, 2)
    with torch.set_grad_enabled(grad):
        output = torch.compile(module, backend="aot_eager", fullgraph=True)(hidden, index, weights)
        torch.testing.assert_close(output, module(hidden, index, weights), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_low_rank_compiles_in_one_graph(gated, bias):
    module = make_experts(gated=gated, bias=bias)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2, "sentinels")
    weights.requires_grad_()
    plain, compiled = module(hidden, index, weights), torch.compile(module, backend="aot_eager", fullgraph=True)
    output = compiled(hidden, index, weights)
    torch.testing.assert_close(output, plain, atol=1e-12, rtol=0)
    assert_same(gradients(module, output, hidden, weights), gradients(module, plain, hidden, weights), atol=1e-12)


@pytest.mark.parametrize(
    ("form", "forward_path"),
    [(form, "fused") for form in ("sparse", "quantized", "sparse_bits", "stored", "stored_bits_each")]
    + [("low_rank", "materialised"), ("sparse", "materialised"), ("low_rank_each", "materialised")],
)
def test_other_forms_compile(form, forward_path):
    module = make_experts(form, forward_path=forward_path)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2)
    output = torch.compile(module, backend="aot_eager")(hidden, index, weights)
    torch.testing.assert_close(output, module(hidden, index, weights), atol=1e-12, rtol=0)


@pytest.mark.parametrize("forward_path", ["fused", "materialised"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_computes_in_half_precision_and_returns_the_input_dtype(form, forward_path):
    module = make_experts(form, dtype=torch.float32, forward_path=forward_path)
    index, weights = route(9, 2)
    x = torch.randn(9, HIDDEN)
    expected = module(x, index, weights.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if forward_path == "materialised" and module.bits is None:
            with pytest.warns(UserWarning, match="materialised' rounds base \\+ delta to torch.bfloat16"):
                output = module(x, index, weights.float())
        else:
            output = module(x, index, weights.float())
        output.sum().backward()
    assert output.dtype == torch.float32
    difference = (output - expected).norm() / expected.norm()
    assert 0 < difference < 2**-5
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("form", ["low_rank", "sparse"])
def test_the_materialised_forward_in_16_bits_warns_only_where_deltas_train(form):
    module = make_experts(form, dtype=torch.bfloat16, forward_path="materialised")
    index, weights = route(9, 2)
    x = torch.randn(9, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        module(x, index, weights)
    module.set_trainable(base=True, deltas=False)
    module(x, index, weights)
    module.float()(x.float(), index, weights)
    module.bfloat16().set_trainable(base=False, deltas=True)
    with pytest.warns(UserWarning, match="small deltas vanish"):
        module(x, index, weights)


@pytest.mark.parametrize("form", PLAIN_FORMS)
@torch.no_grad()
def test_deltas_that_vanish_in_a_16_bit_sum_count_in_the_fused_forward(form):
    torch.manual_seed(0)
    module = make_experts(form, gated=False, bias=False)
    module.act_fn = torch.nn.Identity()
    # 1e-5 beside 1: W + D rounds to W in bfloat16. Rows whose product with the base is 0 leave what the deltas do.
    small = {"low_rank": ("_B",), "sparse": ("_values",), "quantized": ("_scales",)}[form]
    for name, tensor in module.state_dict().items():
        if name.endswith(small):
            tensor *= 1e-5
    module.up_proj.fill_(1.0)
    module.down_proj.fill_(1.0)
    module.bfloat16()
    x, (index, weights) = torch.tensor([[1.0, -1.0] * (HIDDEN // 2)], dtype=torch.bfloat16), route(1, 2)
    expected = naive(module, x, index, weights)
    assert not run(module, "materialised", x, index, weights).any()
    for path in paths(form).keys() - {"materialised"}:
        found = run(module, path, x, index, weights).double()
        assert (found - expected).norm() < 2**-5 * expected.norm(), path
