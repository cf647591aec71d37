"""Hosts whose gates stand on inputs, or with a norm behind the experts: no fused forward; the materialised one is the definition."""

import pytest
import torch
from torch import nn

from support.ders_experts import FORMS, HIDDEN, assert_same, gradients, make_experts, naive, route, run

RULES = {"post_norm": lambda: nn.RMSNorm(HIDDEN).double(), "gates_on_input": lambda: True}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_materialised_is_the_definition(form: str, rule: str) -> None:
    module = make_experts(form, forward_path="materialised", **{rule: RULES[rule]()})
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    index, weights = route(9, 2, "sentinels")
    weights.requires_grad_()
    found, wanted = module(hidden, index, weights), naive(module, hidden, index, weights)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    assert_same(gradients(module, found, hidden, weights), gradients(module, wanted, hidden, weights), atol=1e-12)
    plain = make_experts(form, forward_path="materialised")(hidden, index, weights)
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_fused_is_refused_and_materialised_offered(rule: str) -> None:
    words = rf"these experts have {rule}: write forward_path='materialised'"
    with pytest.raises(ValueError, match=words):
        make_experts(**{rule: RULES[rule]()})
    module = make_experts(forward_path="materialised", **{rule: RULES[rule]()})
    hidden, (index, weights) = torch.randn(9, HIDDEN, dtype=torch.float64), route(9, 2)
    for path in (None, "dense", "grouped", "gathered", "pairwise"):
        with pytest.raises(ValueError, match=words):
            run(module, path, hidden, index, weights)
    module.forward_path = "fused"
    with pytest.raises(ValueError, match=words):
        module(hidden, index, weights)
