"""The benchmark of the routing recorder: both sides take their turn, and the card says what was found."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "recipes" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import audit_card  # noqa: E402  # after the path is set

CARDS = ROOT / "model_cards"
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 16, "vocab_size": 64, "length": 16}


@pytest.fixture(scope="module")
def script():
    """`audit.py` as a module; by its path, because `audit` is also a folder of tests."""
    spec = importlib.util.spec_from_file_location("audit_benchmark", BENCHMARKS / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """The script sets the number of threads; later tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_benchmark_runs_and_its_card_is_rendered_from_its_numbers(
    script, one_thread, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(script.SHAPES, "cpu1", dataclasses.replace(script.SHAPES["cpu1"], **TINY))
    words = ["audit.py", "--rounds", "2", "--steps", "1", "--card_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    results = json.loads((tmp_path / "routing-audit.json").read_text())
    assert (tmp_path / "routing-audit.md").read_text() == audit_card.render_card(results)
    run = results["runs"]["cpu1"]
    assert list(run["methods"]) == ["full", "R 2 of 8"]
    for method in run["methods"].values():
        assert list(method["recorders"]) == list(script.RECORDERS)
        for found in method["recorders"].values():
            assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
            assert 0 < found["own_share"]["median"] < 1
    assert "target" in capsys.readouterr().out


def test_the_committed_card_is_rendered_from_the_committed_numbers():
    results = json.loads((CARDS / "routing-audit.json").read_text())
    assert (CARDS / "routing-audit.md").read_text() == audit_card.render_card(results)


def test_a_visit_records_its_steps_only(script):
    shape = dataclasses.replace(script.SHAPES["cpu1"], **TINY)
    model = script.attach(script.build_base(shape, 0), script.METHODS["S"], 2)
    ids = torch.randint(3, 64, (2, 16))
    recorder = script.RoutingRecorder(model, thresholds=None)
    with script.training_step(model, {"input_ids": ids, "labels": ids}) as (step, _):
        seconds = script.visit(step, recorder, 3, "cpu")
    assert min(seconds) > 0
    assert {router.tokens for router in recorder.reading().routers} == {3 * ids.numel()}


def test_a_bad_number_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_options(["--rounds", "0"])
    assert "--rounds must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((1.001, 1.01, 1.02), "target met, 1.010 of the plain step."),
        ((1.04, 1.05, 1.06), "target not met, 1.050 of the plain step."),
        ((1.01, 1.02, 1.04), "target met, 1.020 of the plain step (not decided"),
    ],
)
def test_the_verdict_tells_a_doubt(ratio, words):
    values = dict(zip(("low", "median", "high"), ratio, strict=True))
    run = {"methods": {"full": {"recorders": {"recorder": {"ratio": values}}}}}
    assert words in audit_card.judge_run(run)[0]
