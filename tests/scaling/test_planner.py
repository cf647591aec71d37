"""The search: constraints hold, tighter ones never help, impossible questions say what is lacking."""

from dataclasses import replace
from functools import cache

import pytest

from hf_moe_ext.scaling.activations import Tokens
from hf_moe_ext.scaling.candidates import enumerate_candidates
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.laws import LAWS
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep, training_memory
from hf_moe_ext.scaling.money import Prices
from hf_moe_ext.scaling.plan_quality import (
    RANKING,
    count_for_laws,
    equivalent_budgets,
    loss_of,
    quick_equivalents,
    tokens_for_loss,
)
from hf_moe_ext.scaling.plan_request import Inference, PlanRequest
from hf_moe_ext.scaling.plan_result import PlanResult
from hf_moe_ext.scaling.planner import plan
from hf_moe_ext.scaling.pricing import Shortage, choose_serving, least_memory
from hf_moe_ext.scaling.shape import MoeShape

CARD = find_hardware("RTX-4090")
NODE = find_hardware("H100-SXM")
HOME = PlanRequest(CARD, gpu_hours=200.0, context_length=1024)


@cache
def _plan(request: PlanRequest) -> PlanResult:
    return plan(request)


def test_candidates_can_be_cut_and_are_all_different() -> None:
    """Heads divide widths, experts are aligned, K is at most E, and every kind is there."""
    candidates = list(enumerate_candidates(HOME))
    assert len({one.keys for one in candidates}) == len(candidates) > 500
    assert {one.block for one in candidates} == {"dense", "standard", "dcca", "ders"}
    for one in candidates:
        config = one.config
        assert config["hidden_size"] % config["num_attention_heads"] == 0
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
        for layer in one.shape.moe_layers:
            assert layer.intermediate_size % 64 == 0
            assert layer.top_k <= layer.num_experts <= 512
            assert layer.latent_size is None or layer.latent_size % 32 == 0


def test_latent_candidates_have_the_parameters_of_standard_ones() -> None:
    """Of their experts; projections come on top."""
    by_key = {
        (c.block, c.shape.hidden_size, c.shape.num_layers, m.num_experts, m.top_k): c.shape.parameters
        for c in enumerate_candidates(HOME)
        if c.block in ("standard", "dcca")
        for m in c.shape.moe_layers[:1]
    }
    pairs = [(counts, by_key["standard", *key[1:]]) for key, counts in by_key.items() if key[0] == "dcca"]
    assert pairs
    for latent, standard in pairs:
        assert latent.routed == standard.routed
        assert latent.projections > 0 == standard.projections


@pytest.mark.parametrize("family", ["olmoe_ext", "mixtral_ext"])
def test_every_plan_keeps_every_bound(family: str) -> None:
    """Memory priced again from scratch, tokens and hours within the budget."""
    request = replace(HOME, family=family, token_supply=3e10)
    result = _plan(request)
    for one in result.plans:
        again = training_memory(MoeShape.from_hf(one.candidate.config), one.training.layout, one.training.step)
        assert again.total == one.training.memory.total <= request.usable_bytes
        assert one.run.num_tokens <= 3e10
        assert one.run.gpu_hours <= 200.0 * (1 + 1e-9)
        step, layout = one.training.step, one.training.layout
        sequences = step.tokens.num_sequences * step.num_micro_batches * layout.data
        assert sequences * request.context_length == request.step_tokens
        assert one.candidate.config["model_type"] == family


@pytest.mark.parametrize(
    ("name", "values"),
    [("memory_bytes", (21e9, 12e9, 6e9)), ("gpu_hours", (200.0, 60.0, 20.0)), ("token_supply", (3e10, 1e10, 3e9))],
)
def test_tightening_a_bound_never_helps(name: str, values: tuple[float, ...]) -> None:
    """The best dense-equivalent compute of the covered plans falls, by the mean of the ranking laws in absolute terms."""
    best = []
    for value in values:
        result = _plan(replace(HOME, **{name: value}))
        covered = [one for one in result.plans if not one.uncovered]
        worth = []
        for one in covered:
            budgets = equivalent_budgets(one.answers, one.counts)
            product = 1.0
            for law in RANKING:
                product *= budgets[law]
            worth.append(product)
        best.append(max(worth))
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1]


def test_uncovered_kinds_are_shown_and_never_recommended() -> None:
    """Latent experts, shared bases, sparsities beyond a fit."""
    result = _plan(HOME)
    assert {one.candidate.block for one in result.plans} == {"dense", "standard", "dcca", "ders"}
    for one in result.plans:
        beyond = one.candidate.block in ("dcca", "ders") or one.candidate.shape.sparsity > 0.95
        assert bool(one.uncovered) == beyond
    assert any(one.uncovered for one in result.pareto)
    # A node for a week: the sparsest promise most.
    ahead = _plan(PlanRequest(NODE, num_devices=8, gpu_hours=8.0 * 168))
    assert ahead.plans[0].uncovered
    assert not ahead.recommended.uncovered


def test_pareto_set_has_no_beaten_plan_and_no_other_is_missing() -> None:
    """By quality and memory within a class, where all take the same hours."""
    result = _plan(replace(HOME, token_supply=3e10))

    def beats(a, b) -> bool:
        same = bool(a.uncovered) == bool(b.uncovered) and a is not b
        return (
            same
            and a.quality >= b.quality
            and a.training.memory.total <= b.training.memory.total
            and a.run.gpu_hours <= b.run.gpu_hours
        )

    for one in result.plans:
        assert any(beats(other, one) for other in result.plans) == (one not in result.pareto)


def test_dense_reference_is_worth_exactly_itself() -> None:
    """And no dense plan is worth more."""
    result = _plan(HOME)
    assert result.dense.quality == pytest.approx(1.0, rel=1e-12)
    assert max(one.quality for one in result.plans if one.candidate.block == "dense") == pytest.approx(1.0)


def test_what_binds() -> None:
    """Few tokens: data. Little memory: memory, with a shape that lacks it. Much of both: arithmetic."""
    assert _plan(replace(HOME, token_supply=3e9)).binding.constraint == "data"
    tight = _plan(replace(HOME, memory_bytes=6e9)).binding
    assert tight.constraint == "memory"
    assert tight.refused[0][2] > 6e9
    assert sum(tight.step_shares.values()) == pytest.approx(1.0)
    roomy = _plan(replace(HOME, memory_bytes=1e12, gpu_hours=20.0)).binding
    assert roomy.constraint == "compute"
    assert roomy.refused == ()


def test_slow_links_bind_and_change_the_dispatch_time() -> None:
    """The same node with links a hundred times slower spends more of a step in the exchange."""
    slow = replace(NODE, intra_node_bytes_per_s=NODE.intra_node_bytes_per_s / 100)
    request = PlanRequest(NODE, num_devices=8, gpu_hours=100.0, blocks=("standard",))
    fast, late = _plan(request), _plan(replace(request, hardware=slow))
    by_keys = {one.candidate.keys: one for one in late.plans}
    shared = [one for one in fast.plans if one.candidate.keys in by_keys and one.training.layout.expert > 1]
    assert shared
    for one in shared:
        assert by_keys[one.candidate.keys].training.time.total > one.training.time.total


def test_budgets_in_money_and_in_hours_are_the_same_question() -> None:
    """Less effort and moved bytes."""
    prices = Prices(2.0, per_gb_moved=0.1, effort_hours=5, effort_hour=10)
    hours = replace(HOME, prices=prices, moved_bytes=1e12)
    money = replace(hours, gpu_hours=None, money=200.0 * 2.0 + 100.0 + 50.0)
    assert money.rented_hours == pytest.approx(200.0)
    assert _plan(money).recommended.candidate == _plan(hours).recommended.candidate
    assert _plan(money).recommended.run.cost.total <= 550.0


def test_budget_in_flops_is_spent_to_the_last_whole_step() -> None:
    """C = F_tok D, rounded down to a batch."""
    request = PlanRequest(CARD, budget_flops=1e20, context_length=1024)
    for one in _plan(request).plans:
        flops = one.candidate.shape.training_flops().total
        assert one.run.num_tokens * flops <= 1e20 < (one.run.num_tokens + request.step_tokens) * flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": 5e8}, r"no shape fits into memory_bytes=5e\+08.*dense d256 x 4, needs .* GB more"),
        ({"gpu_hours": 1e-7}, r"the budget is too small: it comes to .* times as many"),
        ({"token_supply": 1e5}, r"token_supply=1e\+05 .* is too small: .* times as many"),
    ],
)
def test_impossible_questions_say_what_is_lacking_and_how_much(changes: dict, message: str) -> None:
    """One message with the constraint and the factor."""
    with pytest.raises(ValueError, match=message):
        plan(replace(HOME, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_flops": 1e20}, "exactly one budget .* got budget_flops, gpu_hours"),
        ({"gpu_hours": None}, "exactly one budget .* got none"),
        ({"gpu_hours": float("nan")}, "gpu_hours must be above 0, got nan"),
        ({"gpu_hours": None, "money": 10.0}, "needs prices"),
        ({"utilisation": 0.0}, "utilisation must be above 0"),
        ({"memory_reserve": 1.0}, "memory_reserve must be at least 0 and below 1"),
        ({"imbalance": 0.5}, "imbalance must be at least 1"),
        ({"family": "llama"}, "family must be one of"),
        ({"blocks": ("sparse",)}, "blocks must be some of .* got sparse"),
        ({"batch_tokens": 1000}, "batch_tokens must be a multiple of .* 1024, got 1000"),
        ({"precision": "int4"}, "precision must be one of"),
    ],
)
def test_bad_questions_are_refused_when_asked(changes: dict, message: str) -> None:
    """Before anything is searched."""
    with pytest.raises(ValueError, match=message):
        replace(HOME, **changes)


def test_money_that_effort_alone_takes() -> None:
    """By how much it falls short."""
    with pytest.raises(ValueError, match=r"leaves nothing for devices: .* alone take 1000, 900 more"):
        PlanRequest(CARD, money=100.0, prices=Prices(1.0, effort_hours=10, effort_hour=100))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("devices", "zero", "expert"), [(1, 0, 1), (8, 1, 8), (8, 3, 1), (8, 3, 4)])
def test_least_memory_is_below_the_peak_and_near_it(recompute: str, devices: int, zero: int, expert: int) -> None:
    """On shapes of every kind; the bound never turns away what fits."""
    tried = 0
    for candidate in list(enumerate_candidates(HOME))[::37]:
        shape, degree = candidate.shape, expert
        if candidate.block in ("dense", "ders") or (shape.moe_layers and shape.moe_layers[0].num_experts % expert):
            degree = 1
        layout = Layout(data=devices, expert=degree, zero=zero)
        for micro_batches in (1, 4):
            step = TrainingStep(Tokens(2, 1024), recompute=recompute, num_micro_batches=micro_batches)
            bound, peak = least_memory(shape, layout, step), training_memory(shape, layout, step).total
            assert bound <= peak * (1 + 1e-12)
            if bound:
                tried += bound > 0.9 * peak
    assert tried > 20


def test_quick_tables_are_near_the_laws() -> None:
    """They choose what is priced; within two per cent of what is reported."""
    for candidate in list(enumerate_candidates(HOME))[100:700:60]:
        counts = count_for_laws(candidate.shape, 2e10)
        answers = {name: LAWS[name].compute_multiplier(counts[name]) for name in RANKING}
        exact, quick = equivalent_budgets(answers, counts), quick_equivalents(candidate.shape, 2e10)
        for name in RANKING:
            assert quick[name] == pytest.approx(exact[name], rel=0.02)


@pytest.mark.parametrize("law", ["abnar", "joint"])
def test_tokens_for_a_loss_give_that_loss(law: str) -> None:
    """There and back; a loss that no number of tokens reaches gives None."""
    for candidate in list(enumerate_candidates(HOME))[::150]:
        target = loss_of(LAWS[law].count(candidate.shape, 3e10))
        assert tokens_for_loss(law, candidate.shape, target) == pytest.approx(3e10, rel=1e-6)
        assert tokens_for_loss(law, candidate.shape, 0.9) is None


def test_serving_takes_the_fewest_devices_that_hold_it() -> None:
    """A model of four cards' memory is cut; one too large for a node is a shortage with its bytes."""
    request = replace(HOME, hardware=replace(CARD, devices_per_node=4), inference=Inference(1e9, 1024, 4))
    standard = [c for c in enumerate_candidates(request) if c.block == "standard" and c.expert_ratio == 8]
    found = {c.keys: choose_serving(c, request) for c in standard}
    sizes = {one.layout.world_size for one in found.values() if not isinstance(one, Shortage)}
    assert sizes >= {1, 2, 4}
    lacking = [one for one in found.values() if isinstance(one, Shortage)]
    assert lacking
    assert all(one.needed_bytes > one.usable_bytes for one in lacking)
    for one in found.values():
        assert isinstance(one, Shortage) or one.memory.total <= request.usable_bytes
