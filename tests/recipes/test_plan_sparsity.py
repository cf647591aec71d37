"""The worked examples: every number of a recommended plan made again from the JSON alone, by a reader of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.plan_reader import Reader, break_even, equal_loss_steps, saturate

EXAMPLES = ("node_week", "home", "cluster")
ROOTS = 1e-5  # budgets found by two different searches


@pytest.fixture(scope="module")
def folder(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe writes, run as a user does."""
    folder = tmp_path_factory.mktemp("plans")
    command = [sys.executable, str(recipes / "plan_sparsity.py"), "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--- {name} " in done.stdout for name in EXAMPLES)
    return folder


@pytest.fixture(params=EXAMPLES)
def told(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """One example."""
    return json.loads((folder / request.param / "explain.json").read_text())


def _models(told: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "recommended", told["recommended"]
    yield "dense_reference", told["dense_reference"]
    for law, one in told["equal_loss_dense"].items():
        assert one is not None
        yield law, one


def _agree(found: dict[str, Any], printed: dict[str, Any], rel: float = 1e-9) -> None:
    """Every key of ``found`` as printed."""
    assert found
    for key, value in found.items():
        if isinstance(value, dict):
            _agree(value, printed[key], rel)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert printed[key] == pytest.approx(value, rel=rel, abs=1e-12), key
        else:
            assert printed[key] == value, key


def test_counts_and_flops(told: dict[str, Any]) -> None:
    """Integers to the unit."""
    for _, model in _models(told):
        reader = Reader(told, model)
        assert model["parameters"] == reader.parameters()
        assert model["training_flops_per_token"] == reader.training_flops
        assert model["intermediate"]["training_flops"] == reader.flops(6, 14)
        assert model["intermediate"]["forward_flops"] == reader.flops(2, 2)
        _agree(reader.on_rank(model["layout"]), model["intermediate"]["parameters_on_rank"])
        assert model["sparsity"] == pytest.approx(1 - reader.K / reader.E if reader.E else 0.0)


def _agree_on_all(found: dict[str, Any], printed: dict[str, Any], rel: float = 1e-9) -> None:
    """The same, and every number that is printed beside is zero."""
    _agree(found, printed, rel)
    assert all(value == 0 for key, value in printed.items() if key not in found), printed


def test_memory(told: dict[str, Any]) -> None:
    """The walk backward over the listed operations ends at the same peak, which fits."""
    for _, model in _models(told):
        found = Reader(told, model).memory()
        _agree_on_all(found, model["memory"])
        assert found["total"] <= told["derived"]["usable_bytes"]


def test_time_run_and_cost(told: dict[str, Any]) -> None:
    """Seconds of a step, steps of the budget, hours, money."""
    for name, model in _models(told):
        reader = Reader(told, model)
        _agree(reader.derived(), told["derived"])
        _agree(reader.time(), model["time"])
        steps = None
        if name in told["equal_loss_dense"]:
            steps = equal_loss_steps(name, reader, model["target_loss"])
        _agree(reader.run(steps), model["run"])
    seconds = told["recommended"]["time"]
    for part, share in told["binding"]["step_shares"].items():
        assert share == pytest.approx(seconds[part] / seconds["total"])


def test_laws_gains_and_spread(told: dict[str, Any]) -> None:
    """Dense-equivalent budgets by other searches than the laws use; their quotients, mean and spread."""
    budgets = {}
    for key in ("recommended", "dense_reference"):
        model = told[key]
        reader = Reader(told, model)
        budgets[key] = reader.equivalent_budgets(model["run"]["num_tokens"])
        for law, budget in budgets[key].items():
            assert model["equivalent_budgets"][law] == pytest.approx(budget, rel=ROOTS)
            counted = model["laws"][law]["counts"]["budget_flops"]
            assert model["laws"][law]["compute_multiplier"] == pytest.approx(budget / counted, rel=ROOTS)
        assert model["laws"]["routed"]["compute_multiplier"] == pytest.approx(reader.routed_multiplier(), rel=1e-9)
        tokens = model["run"]["num_tokens"]
        assert model["laws"]["abnar"]["counts"]["budget_flops"] == pytest.approx(reader.training_flops * tokens)
        assert model["tokens_per_active_parameter"] == pytest.approx(tokens / model["parameters"]["active"])
    gains = {law: budgets["recommended"][law] / budgets["dense_reference"][law] for law in budgets["recommended"]}
    best = told["recommended"]
    _agree(gains, best["gains"], ROOTS)
    product = gains["abnar"] * gains["joint"] * gains["leverage"]
    assert best["quality"] == pytest.approx(product ** (1 / 3), rel=ROOTS)
    assert best["spread"] == pytest.approx([min(gains.values()), max(gains.values())], rel=ROOTS)


def test_laws_counts_and_details(told: dict[str, Any]) -> None:
    """What each law was asked about and what its multiplier was made from; how many were fitted there."""
    for key in ("recommended", "dense_reference"):
        model, reader = told[key], Reader(told, told[key])
        tokens = model["run"]["num_tokens"]
        counts, details = reader.law_counts(tokens), reader.law_details(tokens)
        assert counts.keys() == model["laws"].keys()
        for law, one in model["laws"].items():
            assert one["counts"].keys() == counts[law].keys()
            _agree(counts[law], one["counts"])
            assert one["details"].keys() == details.get(law, {}).keys()
            if law in details:
                _agree(details[law], one["details"], ROOTS)
        assert model["laws_in_range"] == reader.laws_in_range(tokens)
    reference = told["dense_reference"]
    assert all(
        gain == pytest.approx(1) for gain in (*reference["gains"].values(), *reference["spread"], reference["quality"])
    )


def test_layouts(told: dict[str, Any]) -> None:
    """Degrees multiply to the devices; what the planner does not try is 1."""
    for _, model in _models(told):
        for layout in (model["layout"], *([model["serving"]["layout"]] if model["serving"] else [])):
            assert layout["pipeline"] == layout["context"] == layout["expert_tensor"] == 1
            assert layout["world_size"] == layout["tensor"] * layout["data"]
        assert model["layout"]["expert_data"] == model["layout"]["data"] // model["layout"]["expert"]
        assert model["layout"]["world_size"] == told["request"]["num_devices"]
        assert model["step"]["batch_tokens"] == told["derived"]["step_tokens"]
        assert model["step"]["tokens"]["imbalance"] == told["request"]["imbalance"]
        if model["serving"]:
            assert model["serving"]["layout"]["zero"] == 0


def test_tables(told: dict[str, Any]) -> None:
    """The rows of the recommended plan and of the reference, and what of every row follows from the row itself."""
    for key in ("recommended", "dense_reference"):
        model = told[key]
        for table in ("plans", "pareto"):
            for row in (
                row for row in told[table] if row["name"] == model["name"] and row["zero"] == model["layout"]["zero"]
            ):
                _agree(Reader(told, model).row(), row)
                assert [row["quality_low"], row["quality_high"]] == pytest.approx(model["spread"])
                assert row["quality"] == pytest.approx(model["quality"])
    request, batch = told["request"], told["derived"]["step_tokens"]
    prices = request["prices"]
    fixed = prices["effort_hours"] * prices["effort_hour"] + request["moved_bytes"] / 1e9 * prices["per_gb_moved"]
    for row in (*told["plans"], *told["pareto"]):
        assert row["hours"] == pytest.approx(row["step_s"] * row["num_tokens"] / batch / 3600 / request["utilisation"])
        assert row["gpu_hours"] == pytest.approx(row["hours"] * request["num_devices"])
        assert row["cost"] == pytest.approx(row["gpu_hours"] * prices["gpu_hour"] + fixed)
        assert row["active_parameters"] <= row["total_parameters"]
    for row in told["pareto"]:
        for part, total in (("memory", "memory_bytes"), ("time", "step_s")):
            printed = sum(v for k, v in row[part].items() if k not in ("total", "experts_read", "binds"))
            assert row[part]["total"] == pytest.approx(row[total]) == pytest.approx(printed)
        assert row["all_to_all_share"] == pytest.approx(row["time"]["all_to_all"] / row["time"]["total"])


def test_serving_and_break_even(told: dict[str, Any]) -> None:
    """Of the one example with a demand; the others have neither."""
    if told["request"]["inference"] is None:
        assert told["break_even"] == {}
        assert all(model["serving"] is None for _, model in _models(told))
        return
    for _, model in _models(told):
        found = Reader(told, model).serving()
        _agree(found, model["serving"])
        _agree_on_all(found["memory"], model["serving"]["memory"])
    best, compared = told["recommended"], {}
    for law, other in told["equal_loss_dense"].items():
        compared[f"dense of equal loss ({law})"] = (other["run"]["total_cost"], other["serving"]["cost_per_million"])
    compared["doing nothing"] = (0.0, told["request"]["inference"]["present_cost_per_million"])
    assert told["break_even"].keys() == compared.keys()
    for name, other in compared.items():
        mine = best["run"]["total_cost"], best["serving"]["cost_per_million"]
        found = break_even(*mine, *other)
        _agree(found, told["break_even"][name])
        demand = told["request"]["inference"]["generated_tokens"]
        saved = demand / 1e6 * found["saving_per_million"] - found["one_off"]
        assert told["break_even"][name]["saved_over_demand"] == pytest.approx(saved)


def test_the_recommended_is_of_the_set_and_covered(told: dict[str, Any]) -> None:
    """Within the indifference of the best covered plan; nothing of its class beats it everywhere."""
    best = told["recommended"]
    assert not best["uncovered"]
    covered = [one for one in told["plans"] if one["covered"]]
    assert best["quality"] >= max(one["quality"] for one in covered) * (1 - told["request"]["indifference"])
    assert any(one["name"] == best["name"] for one in told["pareto"])
    for one in told["plans"]:
        assert one["memory_bytes"] <= told["derived"]["usable_bytes"]
        assert one["quality_low"] <= one["quality"] <= one["quality_high"]


CHECKS = (
    test_counts_and_flops, test_memory, test_time_run_and_cost, test_layouts, test_serving_and_break_even,
    test_laws_counts_and_details, test_laws_gains_and_spread,
)  # fmt: skip
# Given, not made: a dense model's unused keys, and widths in bytes that only the listed operations were made from.
GIVEN = {"num_experts", "num_experts_per_tok", "stream", "matmul", "expert", "residual_stream_bytes"}


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], float]]:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(one, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


@pytest.mark.slow
def test_no_number_goes_unchecked(folder: Path) -> None:
    """Each number of the models, changed by some per cent, makes a check of this file fail."""
    told = json.loads((folder / "node_week" / "explain.json").read_text())
    parts = ("recommended", "dense_reference", "equal_loss_dense", "derived", "break_even")
    missed, changed = [], 0
    for path, value in _numbers({part: told[part] for part in parts}):
        if "operations" in path or (path[0] != "recommended" and path[-1] in GIVEN) or path[-1] in ("stream", "matmul"):
            continue
        wrong = json.loads(json.dumps(told))
        holder = wrong
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value + max(1, abs(value) // 50) if isinstance(value, int) else value * 1.02 + (value == 0)
        changed += 1
        for check in CHECKS:
            try:
                check(wrong)
            except (AssertionError, ArithmeticError, ValueError, LookupError, TypeError):
                break
        else:
            missed.append("/".join(map(str, path)))
    assert changed > 400
    assert missed == []


def test_a_second_run_keeps_what_is_there(recipes: Path, folder: Path) -> None:
    """Exit code 2, and the message names the folder."""
    command = [sys.executable, str(recipes / "plan_sparsity.py"), "--example", "home", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "already has config.json" in done.stderr
    assert saturate(0.0, 2.0732, 290.4521) == pytest.approx(2.0732)  # the reader's own formula at its start
