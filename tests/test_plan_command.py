"""``hf-moe plan`` as a user runs it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.plan_request import PlanRequest
from hf_moe_ext.scaling.planner import plan

SMALL = ["plan", "--hardware", "RTX-4090", "--gpu-hours", "20", "--context-length", "1024", "--blocks", "standard"]


def _run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_json_is_the_plan_of_the_same_question() -> None:
    """And with --explain every intermediate value."""
    request = PlanRequest(find_hardware("RTX-4090"), gpu_hours=20.0, context_length=1024, blocks=("standard",))
    expected = plan(request).recommended
    short = json.loads(_run(*SMALL, "--json").stdout)
    full = json.loads(_run(*SMALL, "--json", "--explain").stdout)
    assert short["recommended"]["name"] == full["recommended"]["name"] == expected.candidate.name
    assert short["recommended"]["quality"] == expected.quality
    assert "intermediate" not in short["recommended"]
    assert full["recommended"]["intermediate"]["operations"]["layer"]


def test_every_file_that_is_asked_for(tmp_path: Path) -> None:
    """Nothing else, and nothing half-written."""
    files = {name: str(tmp_path / name) for name in ("plans.csv", "report.html", "report.md")}
    result = _run(
        *SMALL, "--price", "0.3", "--serve-tokens", "1e9", "--present-cost", "2",
        "--csv", files["plans.csv"], "--html", files["report.html"], "--markdown", files["report.md"],
        "--emit-config", str(tmp_path / "model"),
    )  # fmt: skip
    assert "times the compute of the best dense model" in result.stdout
    assert "USD to train" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model"}
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "model" / "config.json").exists()


def test_measured_efficiencies_change_the_time(tmp_path: Path) -> None:
    """As `hf-moe calibrate --output` writes them."""
    (tmp_path / "measured.json").write_text(json.dumps({"efficiency": {"gemm": 0.25, "grouped": 0.2}}))
    usual = json.loads(_run(*SMALL, "--json").stdout)
    slow = json.loads(_run(*SMALL, "--json", "--efficiency", str(tmp_path / "measured.json")).stdout)
    assert slow["request"]["efficiency"]["gemm"] == 0.25
    assert slow["derived"]["expected_flops"] == pytest.approx(usual["derived"]["expected_flops"] / 2)


def test_a_fit_of_ones_own_is_one_more_law(tmp_path: Path) -> None:
    """As `recipes/fit_law.py --output` writes it; what is no such fit is refused."""
    told = {
        "form": "abnar",
        "theta": [9.7, 0.6, 8.6, 0.4, -0.8, -0.17, 2.8, 0.16, 0.16, -0.06],
        "rmse": 0.01,
        "num_runs": 40,
    }
    told |= {"centres": {"n": 0, "d": 0, "s": 0}, "source": "runs.csv", "warnings": []}
    told["ranges"] = {"total_parameters": [1e4, 1e5], "num_tokens": [1e5, 1e6], "sparsity": [0, 0.9]}
    path = tmp_path / "small_grid.json"
    path.write_text(json.dumps(told))
    found = json.loads(_run(*SMALL, "--json", "--law", str(path)).stdout)["recommended"]
    assert found["laws"]["small_grid"]["source"] == "40 runs of runs.csv"
    assert not found["laws"]["small_grid"]["in_range"]
    assert found["gains"]["small_grid"] > 0
    assert "own fit     small_grid: " in _run(*SMALL, "--law", str(path)).stdout
    path.write_text(json.dumps(told | {"theta": [1, 2]}))
    assert "abnar has 10 parameters, theta has 2" in _run(*SMALL, "--law", str(path), code=2).stderr
    assert "none.json" in _run(*SMALL, "--law", str(tmp_path / "none.json"), code=2).stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--hardware", "TPU-9"], "hardware 'TPU-9' is not known; known: A100"),
        (["--flops", "1e20"], "exactly one budget"),
        (["--memory-gb", "0.5"], "no shape fits into memory_bytes=5e+08"),
        (["--tokens", "1e4"], "token_supply=1e+04"),
        (["--blocks", "standard,sparse"], "blocks must be some of"),
        (["--present-cost", "2"], "--present-cost needs --serve-tokens"),
        (["--efficiency", "{folder}/none.json"], "No such file"),
        (["--efficiency", "{folder}/list.json"], "must be JSON with an object efficiency"),
        (["--emit-config", "{folder}/taken"], "already has config.json"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(changes: list[str], message: str, tmp_path: Path) -> None:
    """No traceback, nothing written."""
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    result = _run(*SMALL, *[one.format(folder=tmp_path) for one in changes], "--csv", str(tmp_path / "x.csv"), code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_budget_must_be_given() -> None:
    """All three are optional to the parser, and one is not to us."""
    result = _run("plan", "--hardware", "RTX-4090", code=2)
    assert "exactly one budget of budget_flops, gpu_hours and money, got none" in result.stderr
