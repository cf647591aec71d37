"""Whole pilots on planted data: what must win wins, nothing wins where nothing is to be learnt, and what fails is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ext.pilot.folder import PLAN
from hf_moe_ext.pilot.run import run_pilot


def _arm(told: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in told["arms"] if arm["candidate"] == name)


def deterministic(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns that two runs with one seed share."""
    return [{key: arm[key] for key in told["deterministic_columns"]} for arm in told["arms"]]


def test_known_winner_wins(planted_pilot: dict[str, Any]) -> None:
    answer = planted_pilot["recommendation"]
    assert (answer["answer"], answer["candidate"]) == ("recommended", "perft-r")
    assert answer["comparisons"]["against_base"]["perft-r"]["high"] < -0.5
    starved = answer["comparisons"]["against_best"]["perft-s:r=1"]
    assert starved["low"] > 0
    assert starved["adjusted_p"] < 0.01
    assert "few: small differences cannot be shown" in " ".join(answer["doubts"])
    assert answer["full_job"]["planner"]["cost"] > 0


def test_rows_of_the_table_are_complete(planted_pilot: dict[str, Any], planted_folder: Path) -> None:
    base, routed = _arm(planted_pilot, "base"), _arm(planted_pilot, "perft-r")
    assert (base["steps"], base["parameters"]["trainable"], base["stored_bytes"]) == (0, 0, 0)
    assert (routed["steps"], routed["seeds"]) == (64, [0, 1])
    # Rows of four words, the answer and its end; 389 rows make 49 batches, the last of them with 5 rows.
    assert routed["tokens"] == (64 * 8 - 3) * 6
    assert routed["tokens"] == _arm(planted_pilot, "perft-s:r=1")["tokens"]
    assert 0 < routed["parameters"]["active"] < routed["parameters"]["stored"]
    assert routed["parameters"]["trainable"] == 2 * (4 * 2 * 32 * 16 + 4 * 32)  # layers x (adapters + router)
    files = list((planted_folder / "adapters").glob("perft-r-*seed0*/*.safetensors"))
    assert [file.stat().st_size for file in files] == [routed["stored_bytes"]]
    assert 0 < routed["routing"]["routing_load_max_default"] <= 1
    for column in planted_pilot["measured_columns"]:
        assert routed[column] > 0, column
    written = json.loads((planted_folder / "pilot.json").read_text())
    assert written == json.loads(json.dumps(planted_pilot))


def test_nothing_to_learn_is_no_difference(request_of, nothing_to_learn: Path, tmp_path: Path) -> None:
    told = run_pilot(request_of(data=str(nothing_to_learn), learning_rates=(1e-3,)), tmp_path / "pilot")
    assert (told["recommendation"]["answer"], told["recommendation"]["candidate"]) == ("no difference shown", None)
    assert told["recommendation"]["full_job"] is None


def test_a_rate_that_diverges_fails_and_the_others_go_on(request_of, tmp_path: Path) -> None:
    wanted = request_of(candidates=("perft-s",), learning_rates=(1e-2, 3e38), num_seeds=1, steps=16, min_steps=4)
    told = run_pilot(wanted, tmp_path / "pilot")
    tried = {trial["rate"]: trial for trial in _arm(told, "perft-s")["tried"] if trial["steps"] == 4}
    assert tried[3e38]["loss"] is None
    assert "nan" in tried[3e38]["reason"]
    assert "learning rate 3e+38" in tried[3e38]["reason"]
    assert tried[1e-2]["loss"] is not None
    assert _arm(told, "perft-s")["status"] == "done"


def test_a_candidate_that_cannot_be_attached_is_left_out_with_its_reason(request_of, tmp_path: Path) -> None:
    wanted = request_of(candidates=("perft-s", "perft-r:top_k=9"), num_seeds=1, steps=16, min_steps=4)
    told = run_pilot(wanted, tmp_path / "pilot")
    assert "top_k" in told["plan"]["left_out"]["perft-r:top_k=9"]
    assert any(doubt.startswith("perft-r:top_k=9 was left out") for doubt in told["recommendation"]["doubts"])
    assert [arm["candidate"] for arm in told["arms"]] == ["base", "perft-s"]


def test_too_small_a_budget_is_refused_with_what_it_needs(request_of, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--budget-minutes 0\.05 is too small: .* need about [0-9.]+ minutes on 2 processes"
    ):
        run_pilot(request_of(budget_minutes=0.05), tmp_path / "pilot")
    assert not (tmp_path / "pilot" / PLAN).exists()


def test_another_pilot_in_the_folder_is_refused(
    request_of, planted_pilot: dict[str, Any], planted_folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"holds a pilot with other settings \(num_seeds, seed\)"):
        run_pilot(request_of(seed=1, num_seeds=3), planted_folder)
    other = planted_folder.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no pilot's"):
        run_pilot(request_of(), other)


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(
    request_of, planted_pilot: dict[str, Any], tmp_path: Path
) -> None:
    again = run_pilot(request_of(), tmp_path / "again")
    assert deterministic(again) == deterministic(planted_pilot)
    assert again["recommendation"]["comparisons"] == planted_pilot["recommendation"]["comparisons"]
    other = run_pilot(request_of(seed=7), tmp_path / "other")
    assert deterministic(other) != deterministic(planted_pilot)


@pytest.mark.slow
def test_a_metric_of_the_users_own(request_of, tmp_path: Path) -> None:
    module = tmp_path / "first_word" / "first_word.py"
    module.parent.mkdir()
    module.write_text(
        "import datasets\nimport evaluate\n\n"
        "class FirstWord(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('string'), 'references': datasets.Value('string')})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        same = [p.split()[:1] == r.split()[:1] for p, r in zip(predictions, references)]\n"
        "        return {'first_word': sum(same) / len(same)}\n"
    )
    wanted = request_of(metric=str(module.parent), metric_rows=24, steps=256, candidates=("perft-r",), max_new_tokens=3)
    told = run_pilot(wanted, tmp_path / "pilot")
    assert list(_arm(told, "perft-r")["metric_scores"]) == ["first_word"]
    assert len(_arm(told, "perft-r")["metric_by_seed"]) == 2
    assert _arm(told, "perft-r")["metric"] > _arm(told, "base")["metric"]


@pytest.mark.slow
def test_a_dense_model_is_compared_with_its_upcycled_self(request_of, two_tasks: Path, tmp_path: Path) -> None:
    from support import planted

    dense = planted.save_model(tmp_path / "dense", "llama")
    wanted = request_of(model=str(dense), candidates=(), steps=32, min_steps=8, num_seeds=2)
    told = run_pilot(wanted, tmp_path / "pilot")
    assert [arm["candidate"] for arm in told["arms"]] == ["base", "lora-qv", "full", "ders"]
    assert {arm["status"] for arm in told["arms"]} == {"done"}
    assert _arm(told, "ders")["parameters"]["model"] > _arm(told, "full")["parameters"]["model"]
    assert "routing_load_max" in _arm(told, "ders")["routing"]
    assert _arm(told, "full")["routing"] == {}
