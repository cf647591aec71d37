"""Planted faults are found, stand where they belong, and say what to change; a healthy model has none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

from hf_moe_ext import PerftConfig
from hf_moe_ext.audit.findings import effective_experts, find_all
from hf_moe_ext.audit.inspection import Inspection, TokenLoss, inspect_model
from hf_moe_ext.audit.text_batches import read_examples
from support import zoo
from support.inspected import MODEL, inspection, random_rows, router, write_rows
from support.words import build_tokenizer

EVEN = [500, 480, 520, 510, 490, 500, 505, 495]


def _codes(told: Inspection) -> list[str]:
    return [one.code for one in find_all(told)]


def test_a_healthy_model_has_no_findings() -> None:
    assert _codes(inspection(router(EVEN), router(EVEN, layer=1), router([900, 1100], kind="default"))) == []


def test_dead_experts_stand_first_and_are_named() -> None:
    hot = [2000, *[100] * 7]
    told = find_all(inspection(router(hot), router([500, 500, 0, 500, 500, 0, 500, 500], layer=3)))
    assert [one.code for one in told] == ["dead-experts", "hot-experts"]
    assert told[0].severity == "serious"
    assert told[0].where == "model.layers.3.mlp.experts, base router"
    assert "experts 2, 5 of 8 got none of 3000 tokens" in told[0].message
    assert "router_aux_loss_coef" in told[0].change
    assert "expert 0 gets 5.9 times" in told[1].message


def test_few_tokens_make_no_dead_experts() -> None:
    told = find_all(inspection(router([20, 20, 0, 20, 0, 3, 3, 4])))
    assert [one.code for one in told] == ["few-tokens"]
    assert "at least 80 tokens" in told[0].change


def test_a_collapsed_router_is_the_worst() -> None:
    told = find_all(
        inspection(router([4000, 10, 12, 9, 8, 11, 10, 10]), router([500, 500, 0, 500, 500, 500, 500, 500], layer=1))
    )
    assert [one.code for one in told][:2] == ["collapsed-router", "dead-experts"]
    assert "98% of the choices go to expert 0 of 8" in told[0].message


def test_two_of_two_is_no_collapse() -> None:
    """Nothing to choose between: all experts in use, or top_k of top_k."""
    assert _codes(inspection(router([500, 500], top_k=2))) == []


def test_effective_experts_of_known_loads() -> None:
    assert effective_experts(np.full(8, 1 / 8)) == pytest.approx(8.0)
    assert effective_experts(np.array([0.5, 0.5, 0.0])) == pytest.approx(2.0)


def test_flat_and_blind_routers() -> None:
    flat = router(EVEN, entropy=0.995)
    told = find_all(inspection(flat, selectivity=0.004))
    assert [one.code for one in told] == ["near-uniform-router"]
    blind = router([1000, 900, 1100, 1000], kind="default", entropy=0.6)
    told = find_all(inspection(router(EVEN), blind, selectivity=0.004))
    assert [(one.code, one.router) for one in told] == [("router-ignores-input", "default")]
    assert "the token decides 0.40% of the choice" in told[0].message
    assert _codes(inspection(blind, selectivity=0.02)) == []


def test_values_that_are_not_finite_are_serious() -> None:
    told = find_all(inspection(router(EVEN, invalid=12), loss=float("nan")))
    assert [one.code for one in told] == ["loss-not-finite", "routing-not-finite"]


def test_slices_apart_and_alike() -> None:
    apart = {"code": np.array([900, 100, 0, 0]), "law": np.array([0, 100, 450, 450])}
    told = find_all(inspection(router([900, 200, 450, 450], slices=apart)))
    assert [one.code for one in told] == ["slices-apart"]
    assert told[0].size == pytest.approx(0.9)
    assert "slices code and law" in told[0].where
    generator = np.random.default_rng(0)
    same = {name: generator.multinomial(2000, [0.4, 0.3, 0.2, 0.1]) for name in ("code", "law", "prose")}
    alike = router(sum(same.values()).tolist(), kind="default", slices=same)
    assert _codes(inspection(alike)) == ["slices-alike"]
    # Of the base model's router that is no news, and few tokens tell nothing of slices.
    assert _codes(inspection(router(sum(same.values()).tolist(), slices=same))) == []
    tiny = {"code": np.array([9, 0, 0, 0]), "law": np.array([0, 3, 3, 3])}
    assert "slices-apart" not in _codes(inspection(router(EVEN[:4], slices=tiny)))


def _inspect(model, tmp_path: Path, rows=None, **options) -> Inspection:
    write_rows(tmp_path / "text.jsonl", rows or random_rows())
    data = read_examples(str(tmp_path / "text.jsonl"), build_tokenizer(), **options)
    return inspect_model(model, data, MODEL)


@pytest.mark.parametrize(("family", "bias"), [("gpt_oss", "bias"), ("deepseek_v3", "e_score_correction_bias")])
def test_an_expert_killed_in_a_real_model_stands_first(family: str, bias: str, tmp_path: Path) -> None:
    """By its router's bias, as a run does that balances by biases and has overshot."""
    model = zoo.build(family)
    assert "dead-experts" not in _codes(_inspect(model, tmp_path))
    name, tensor = [
        (name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.endswith((f"router.{bias}", f"gate.{bias}"))
    ][-1]  # fmt: skip
    with torch.no_grad():
        tensor[1] = -50.0
    worst = find_all(_inspect(model, tmp_path))[0]
    assert worst.code == "dead-experts"
    assert worst.where == f"{'.'.join(name.split('.')[:4])}.experts, base router"
    assert worst.message.startswith(f"expert 1 of {len(tensor)} got none of 1000 tokens")


def test_an_adapter_router_without_a_view_of_its_input_is_found(tmp_path: Path) -> None:
    config = PerftConfig(task_type="CAUSAL_LM", variant="R", r=4, num_experts=4, top_k=2, init_weights=False)
    model = get_peft_model(zoo.build("olmoe"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "perft_router" in name:
                # In layer 1 it says nothing of the token, in layer 0 much.
                parameter.mul_(0.0).add_(torch.randn_like(parameter) if ".layers.0." in name else 0.0)
    found = [one for one in find_all(_inspect(model, tmp_path)) if one.code == "router-ignores-input"]
    assert [one.where for one in found] == ["model.layers.1.mlp.experts, default router"]


def test_a_planted_slice_is_routed_elsewhere(tmp_path: Path) -> None:
    """Words of one slice have one embedding, those of the other its opposite: the first layer cannot but part them."""
    model = zoo.build("olmoe")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[30:60] = embedding[30] + 0.05 * embedding[30:60]
        embedding[60:96] = -embedding[30] + 0.05 * embedding[60:96]
    low = random_rows(40, low=30)
    for row in low:
        words = [int(word[1:]) for word in row["text"].split()]
        row["text"] = " ".join(f"w{30 + w % 30 if row['slice'] == 'odd' else 60 + w % 36}" for w in words)
    found = [one for one in find_all(_inspect(model, tmp_path, low)) if one.code == "slices-apart"]
    assert [one.where for one in found] == ["slices even and odd, base router"]
    assert found[0].size > 0.8


def test_slices_with_losses_do_not_disturb() -> None:
    assert _codes(inspection(router(EVEN), slice_losses={"a": TokenLoss(1.0, 10), "b": TokenLoss(9.0, 10)})) == []
