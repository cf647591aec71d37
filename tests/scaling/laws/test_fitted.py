"""A saved fit as a law: published numbers in its form give the published law's answers; what it cannot tell, it does not."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hf_moe_ext.scaling.feed_forward import DenseFfn, MoeFfn
from hf_moe_ext.scaling.fit_file import SavedFit
from hf_moe_ext.scaling.fit_forms import find_form
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.laws import LAWS, abnar, add_law, joint
from hf_moe_ext.scaling.laws.fitted import FittedLaw, read_law
from hf_moe_ext.scaling.laws.layout import IdealLayout
from hf_moe_ext.scaling.plan_explain import explain
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.plan_text import format_plan
from hf_moe_ext.scaling.planner import plan
from hf_moe_ext.scaling.shape import MoeShape

RANGES = {
    "total_parameters": (1e8, 1e10), "active_parameters": (1e7, 3e9), "num_tokens": (1e9, 1e12), "sparsity": (0.0, 0.95),
    "num_experts": (1.0, 32.0),
}  # fmt: skip


def saved(name, values):
    """A fit whose numbers are these, by the paper's names, with nothing taken off its features."""
    form = find_form(name)
    theta = [math.log(values[p.name]) if p.is_log else values[p.name] for p in form.parameters]
    centres = dict.fromkeys(form.features, 0.0)
    ranges = {key: RANGES[key] for key in form.variables}
    return SavedFit(form, np.array(theta), centres, ranges, 0.01, 99, "runs.csv")


def own_abnar(**changes):
    values = {
        "a": abnar.A,
        "alpha": abnar.ALPHA,
        "b": abnar.B,
        "beta": abnar.BETA,
        "c": abnar.C,
        "lambda": abnar.LAMBDA,
    }
    values |= {"d": abnar.D, "delta": abnar.DELTA, "gamma": abnar.GAMMA, "e": abnar.E}
    return saved("abnar", values | changes)


def own_joint():
    values = {"a": joint.A, "delta": joint.DELTA, "alpha": joint.ALPHA, "gamma": joint.GAMMA, "b": joint.B}
    values |= {"omega": joint.OMEGA, "beta": joint.BETA, "zeta": joint.ZETA, "c": joint.IRREDUCIBLE}
    return saved("joint", values | {"E_start": joint.E_START, "E_max": joint.E_MAX - joint.E_START})


def shape(num_experts=16, width=1024):
    ffn = MoeFfn(num_experts, 2, 1024) if num_experts else DenseFfn(4 * width)
    return MoeShape.uniform(12, width, ffn, num_heads=8, vocab_size=50304, context_length=2048)


@pytest.mark.parametrize("num_experts", [0, 4, 16, 64])
@pytest.mark.parametrize("num_tokens", [2e10, 1e11])
def test_abnar_s_numbers_give_abnar_s_answers(num_experts, num_tokens):
    law, model = FittedLaw(own_abnar(), "mine"), shape(num_experts)
    own = law.compute_multiplier(law.count(model, num_tokens))
    published = LAWS["abnar"].compute_multiplier(LAWS["abnar"].count(model, num_tokens))
    assert own.value == pytest.approx(published.value, rel=1e-4)
    assert own.details["loss"] == pytest.approx(published.details["loss"], rel=1e-12)


def test_the_joint_form_finds_the_dense_budget_of_a_search_by_hand():
    law, model = FittedLaw(own_joint(), "mine"), shape(16)
    counts = law.count(model, 5e10)
    assert counts["num_experts"] == 8
    loss = float(joint.loss(model.active_parameters, 5e10, 8))
    answer = law.compute_multiplier(counts)
    assert answer.details["loss"] == pytest.approx(loss)
    # Every width of a fine grid at the budget it names: the best of them has the same loss.
    budget = answer.value * counts["budget_flops"]
    dense = [IdealLayout(width, 1) for width in np.geomspace(64, 8192, 4000)]
    best = min(float(joint.loss(one.active_parameters, budget / one.training_flops, 1)) for one in dense)
    assert best == pytest.approx(loss, abs=1e-6)


def test_beyond_its_runs_it_says_so():
    law = FittedLaw(own_abnar(), "mine")
    inside = law.compute_multiplier(law.count(shape(16), 2e10))
    assert inside.in_range
    beyond = law.compute_multiplier(law.count(shape(64), 1e8))
    assert {flag.kind for flag in beyond.flags} == {"outside_range"}
    assert ["sparsity" in flag.message or "num_tokens" in flag.message for flag in beyond.flags] == [True, True]
    assert not beyond.in_range
    latent = MoeShape.uniform(
        4, 256, MoeFfn(8, 2, 256, latent_size=64), num_heads=4, vocab_size=50304, context_length=2048
    )
    flags = law.compute_multiplier(law.count(latent, 2e10)).flags
    assert any("latent experts" in flag.message for flag in flags)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": -0.1},  # more tokens, a higher loss: no budget is the least
        {"lambda": -1.0, "d": 1e-9},  # sparsity lowers the loss below any dense one's
    ],
)
def test_where_no_dense_model_compares_there_is_no_number(changes):
    law = FittedLaw(own_abnar(**changes), "mine")
    answer = law.compute_multiplier(law.count(shape(16), 1e13))
    assert answer.value is None
    assert any("no dense model of any budget" in flag.message for flag in answer.flags)
    assert math.isfinite(answer.details["loss"])


@pytest.mark.parametrize("name", ["abnar_size", "joint_size", "routed", "chinchilla", "fine_grained", "leverage"])
def test_a_form_without_size_tokens_and_sparsity_is_refused(name):
    form = find_form(name)
    with pytest.raises(
        ValueError, match=f"a law of size, tokens and sparsity, which {name} is not; fit one of abnar, joint"
    ):
        FittedLaw(replace(own_abnar(), form=form), "mine")


def test_a_published_name_is_refused():
    with pytest.raises(ValueError, match="law 'joint' is a published one's name; known: abnar, joint"):
        add_law(FittedLaw(own_abnar(), "joint"))
    assert add_law(None) is LAWS


REQUEST = PlanRequest(find_hardware("RTX-4090"), gpu_hours=100.0, context_length=1024)


def test_a_plan_shows_it_and_is_ranked_without_it():
    law = FittedLaw(own_abnar(), "mine")
    with_it, without = plan(REQUEST, law), plan(REQUEST)
    assert [one.candidate for one in with_it.plans] == [one.candidate for one in without.plans]
    assert [one.quality for one in with_it.plans] == [one.quality for one in without.plans]
    assert with_it.recommended.candidate == without.recommended.candidate
    told = json.loads(json.dumps(explain(with_it), allow_nan=False))
    best = told["recommended"]
    assert best["laws"]["mine"]["provenance"] == "own runs"
    assert best["laws"]["mine"]["source"] == "99 runs of runs.csv"
    assert best["gains"]["mine"] == pytest.approx(best["gains"]["abnar"], rel=1e-3)
    assert best["spread"] == list(without.recommended.spread)
    assert f"own fit     mine: {best['gains']['mine']:.2f} times dense" in format_plan(told)
    assert "own fit" not in format_plan(explain(without))


def test_a_law_is_called_as_its_file(tmp_path):
    fit = own_joint()
    told = {"form": "joint", "theta": fit.theta.tolist(), "centres": fit.centres, "ranges": fit.ranges, "rmse": 0.1}
    (tmp_path / "grid-2026.json").write_text(
        json.dumps(told | {"num_runs": 7, "source": "mine.csv", "warnings": ["odd"]})
    )
    law = read_law(tmp_path / "grid-2026.json")
    assert law.card.name == "grid-2026"
    assert law.card.caveat == "odd"
    values = {"active_parameters": 1e9, "num_tokens": 2e10, "num_experts": 8.0}
    assert law.loss(values) == pytest.approx(2.508777, abs=1e-6)  # of the specification
