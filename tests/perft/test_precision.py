"""The router is float32 at least, whatever the base model runs in; and it learns."""

import pytest
import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.ops.routing import choose_experts, expert_weights
from hf_moe_ext.perft.layer import PerftLayer
from support import zoo
from support.perft import batch, perft_r


def router_logit_dtypes(model, inputs):
    from hf_moe_ext.perft import layer as module

    seen, real = [], module.choose_experts
    module.choose_experts = lambda logits, top_k: (seen.append(logits.dtype), real(logits, top_k))[1]
    try:
        model(**inputs).loss.backward()
    finally:
        module.choose_experts = real
    return set(seen)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_router_precision(base_dtype, autocast):
    if autocast is not None and {base_dtype, autocast} == {torch.float16, torch.bfloat16}:
        pytest.skip("PyTorch's autocast itself refuses to mix float16 and bfloat16")
    model = perft_r(dtype=base_dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        dtypes = router_logit_dtypes(model, batch())
    expected = torch.float64 if base_dtype == torch.float64 else torch.float32
    assert dtypes == {expected}
    for name, parameter in model.named_parameters():
        if "perft_" in name:
            assert parameter.dtype == expected, name
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_autocast_does_not_touch_the_routers_input():
    layer = next(m for m in perft_r(dtype=torch.float32).eval().modules() if isinstance(m, PerftLayer))
    hidden, index, weights = torch.randn(4096, 32), torch.zeros(4096, 1, dtype=torch.long), torch.ones(4096, 1)
    chosen = []
    real = layer._route
    layer._route = lambda *args: (chosen.append(real(*args)[0]), real(*args))[1]
    with torch.no_grad():
        layer(hidden, index, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(hidden, index, weights)
    assert torch.equal(*chosen)


def test_a_base_cast_after_attaching_still_routes_in_float32():
    model = perft_r(dtype=torch.float32).to(torch.bfloat16)
    assert router_logit_dtypes(model, batch()) == {torch.float32}


@pytest.mark.parametrize("kind", ["lora", "parallel"])
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_bfloat16_is_near_float32(variant, kind):
    config = PerftConfig(variant=variant, adapter=kind, r=4, init_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    exact = get_peft_model(zoo.build("olmoe"), config).eval()
    rough = get_peft_model(zoo.build("olmoe", dtype=torch.bfloat16), config).eval()
    rough.load_state_dict({n: p for n, p in exact.state_dict().items() if "perft_" in n}, strict=False)
    layer = next(m for m in exact.modules() if isinstance(m, PerftLayer))
    coarse = next(m for m in rough.modules() if isinstance(m, PerftLayer))
    hidden = torch.randn(16, 32)
    index, weights = torch.randint(0, 8, (16, 2)), torch.rand(16, 2)
    with torch.no_grad():
        fine = layer._delta("default", hidden, index, weights, None)
        coarse_delta = coarse._delta("default", hidden.bfloat16(), index, weights.bfloat16(), None)
    # Eight bits of mantissa in hidden, A, B and weights: a few percent of the largest value. Routing is float32, so a
    # flip needs a near tie, of which this batch has none.
    assert (fine - coarse_delta.float()).abs().max() < 0.05 * fine.abs().max()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_the_language_model_loss_reaches_the_router(family, top_k):
    """The defect of the authors' OLMoE code: there the auxiliary loss is the router's only signal."""
    model = perft_r(family, top_k=top_k, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if "perft_router" in name:
            assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.filterwarnings("ignore:PerftConfig. variant='R' with num_experts=1:UserWarning")
def test_a_router_over_one_adapter_has_exactly_no_gradient():
    model = perft_r(num_experts=1, top_k=1, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    model(**batch()).loss.backward()
    assert all(p.grad.abs().max() == 0 for n, p in model.named_parameters() if "perft_router" in n)


@pytest.mark.parametrize(("aux", "steps"), [(0.01, 1), (0.0, 2)])
def test_the_router_moves(aux, steps):
    """From B = 0: after one step with the auxiliary loss, after two without it (B must move first)."""
    model = perft_r(dtype=torch.bfloat16, init_weights=True, router_aux_loss_coef=aux, router_z_loss_coef=0.0)
    routers = {n: p.detach().clone() for n, p in model.named_parameters() if "perft_router" in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        if step == 0 and not aux:
            model(**batch()).loss.backward()
            assert all(p.grad.abs().max() == 0 for n, p in model.named_parameters() if "perft_router" in n)
            optimizer.step()
            continue
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in routers:
            assert not torch.equal(parameter, routers[name]), name


def test_scaling_the_router_changes_the_output_when_every_adapter_is_active():
    """Catches the use of the base router's probabilities in place of the adapter router's (N = M)."""
    model = perft_r(num_experts=3, top_k=3).eval()
    with torch.no_grad():
        before = model(**batch()).logits
        for name, parameter in model.named_parameters():
            if "perft_router" in name:
                parameter.mul_(3)
        assert (model(**batch()).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "settings", "sums_to_one"), [
    ("mixtral", {}, True),
    ("olmoe", {}, False),
    ("olmoe", {"norm_topk_prob": True}, True),
    ("gpt_oss", {}, True),
    ("deepseek_v3", {}, True),
    ("deepseek_v3", {"norm_topk_prob": False}, False),
])  # fmt: skip
def test_inherit_follows_the_base_model(family, settings, sums_to_one):
    model = get_peft_model(zoo.build(family, **settings), PerftConfig(r=2, num_experts=4, top_k=2))
    layer = next(m for m in model.modules() if isinstance(m, PerftLayer))
    model.eval()
    _, weights = layer._route("default", torch.randn(64, layer.in_features), None, None)
    if sums_to_one:
        torch.testing.assert_close(weights.sum(-1), torch.ones(64))
    else:
        assert (weights.sum(-1) < 1 - 1e-4).all()
    single = get_peft_model(zoo.build(family, **settings), PerftConfig(r=2, num_experts=4, top_k=1))
    layer = next(m for m in single.eval().modules() if isinstance(m, PerftLayer))
    assert (layer._route("default", torch.randn(64, layer.in_features), None, None)[1] < 1 - 1e-4).all()


@pytest.mark.filterwarnings("ignore:PerftConfig. variant='R' with num_experts=1:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_one_routed_adapter_equals_a_single_one(kind):
    """Identity (ii): the softmax of one logit is 1."""
    routed = get_peft_model(
        zoo.build("olmoe", dtype=torch.float64), PerftConfig(adapter=kind, r=4, num_experts=1, init_weights=False)
    ).eval()
    single = get_peft_model(
        zoo.build("olmoe", dtype=torch.float64), PerftConfig(variant="S", adapter=kind, r=4, init_weights=False)
    ).eval()
    single.load_state_dict({n: p for n, p in routed.state_dict().items() if "perft_router" not in n})
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(routed(**inputs).logits, single(**inputs).logits, atol=1e-10, rtol=0)


def test_a_renormalised_single_choice_would_cut_the_gradient():
    """Why ``normalize_top_k=True`` with ``top_k=1`` is refused: the weight is 1 whatever the router says."""
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    index = choose_experts(logits, 1)
    (expert_weights(logits, index, normalize=True) * torch.randn(7, 1, dtype=torch.float64)).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_adapters_are_made_where_the_block_is():
    with torch.device("meta"):
        base = zoo.build("olmoe")
    model = get_peft_model(base, PerftConfig(r=4))
    assert {p.device.type for n, p in model.named_parameters() if "perft_" in n} == {"meta"}
