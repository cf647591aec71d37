"""The command of the full job: every flag exists, and means what the arm did."""

import shlex
from pathlib import Path

import pytest

from hf_moe_ext.pilot import PilotRequest
from hf_moe_ext.pilot.candidates import TABLE, Candidate, read_candidate
from hf_moe_ext.pilot.full_job import estimate_here, price_full_job, write_commands

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
REQUEST = PilotRequest("org/model", "rows.jsonl", batch_size=4, full_epochs=2.0)
SETTINGS = [read_candidate("perft-r:num_experts=8,top_k=1,r=4"), read_candidate("lora-qv:target_modules=q_proj+k_proj")]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """The recipe's own reading of its arguments."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import finetune_arguments

    return finetune_arguments


@pytest.mark.parametrize("candidate", [*[c for c in TABLE if c.kind != "base"], *SETTINGS], ids=lambda c: c.name)
def test_recipe_takes_every_flag(parse, candidate: Candidate) -> None:
    commands = write_commands(candidate, 1e-3, REQUEST, 101, ["experts.gate_up_proj", "experts.down_proj"])
    words = shlex.split(commands[-1])
    assert words[:3] == ["accelerate", "launch", "recipes/finetune.py"]
    arguments = parse.parse_arguments(words[3:])
    assert parse.find_idle_settings(arguments) == []
    assert (arguments.training.learning_rate, arguments.training.num_train_epochs) == (1e-3, 2.0)
    assert arguments.training.per_device_train_batch_size == 4
    adapter = arguments.adapter
    if candidate.kind == "perft":
        assert (adapter.peft, adapter.variant, adapter.r) == ("perft", candidate.variant, candidate.settings["r"])
        assert (adapter.router_learning_rate == 0) == (candidate.router == "frozen")
        for name in ("num_experts", "top_k", "expert_fraction"):
            assert getattr(adapter, name) == candidate.settings.get(name)
    elif candidate.kind == "lora_experts":
        assert adapter.lora_target_parameters == ["experts.gate_up_proj", "experts.down_proj"]
    elif candidate.kind == "lora":
        assert (adapter.peft, adapter.lora_target_modules) == ("lora", candidate.settings["target_modules"])
    else:
        assert adapter.peft == "full"


def test_upcycling_comes_first(parse) -> None:
    from typer.testing import CliRunner

    from hf_moe_ext.cli import app

    candidate = read_candidate("ders:num_experts=8")
    first, second = write_commands(candidate, 1e-3, REQUEST, 100)
    assert first == "hf-moe upcycle org/model --output outputs/upcycled --seed 0 --num-experts 8 --top-k 2 --rank 4"
    assert "--model_name_or_path outputs/upcycled" in second
    # Every option is known: only the model is not there.
    result = CliRunner().invoke(app, [*shlex.split(first)[1:], "--dry-run"])
    assert "No such option" not in result.output


def test_time_here_and_price_there(tmp_path: Path) -> None:
    from support import planted

    here = estimate_here(0.5, REQUEST, 101)
    assert here["steps"] == 52  # 26 batches, twice
    assert here["hours"] == pytest.approx(52 * 0.5 / 3600)
    assert price_full_job(REQUEST, 101, 50.0) is None
    model = planted.save_model(tmp_path / "model")
    priced = price_full_job(PilotRequest(str(model), "rows.jsonl", hardware="H100-SXM", price=3.6), 800, 12.0)
    assert priced is not None
    assert priced["steps"] == 300
    assert priced["cost"] == pytest.approx(priced["hours"] * 3.6)
    assert priced["fits"]
