"""A tiny MoE model with its tokenizer, two planted data sets, and pilots small enough for the suite."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ext.pilot import PilotRequest
from hf_moe_ext.pilot.run import run_pilot
from support import planted


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE."""
    return planted.save_model(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that can be learnt."""
    return planted.two_tasks(tmp_path_factory.mktemp("rows") / "two_tasks.jsonl")


@pytest.fixture(scope="session")
def nothing_to_learn(tmp_path_factory: pytest.TempPathFactory, moe_dir: Path) -> Path:
    """Rows drawn from the model itself."""
    return planted.nothing_to_learn(tmp_path_factory.mktemp("rows") / "nothing.jsonl", moe_dir)


@pytest.fixture(scope="session")
def request_of(moe_dir: Path, two_tasks: Path):
    """A small request; keywords change it. The starved candidate has one adapter of rank 1."""
    small = PilotRequest(
        str(moe_dir), str(two_tasks), candidates=("perft-r", "perft-s:r=1"), learning_rates=(1e-2,), steps=64, num_seeds=2,
        threads=1, processes=2, max_length=16, budget_minutes=60.0,
    )  # fmt: skip

    def make(**changes: Any) -> PilotRequest:
        return replace(small, **changes)

    return make


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pilot of the learnable rows is kept."""
    return tmp_path_factory.mktemp("pilots") / "two_tasks"


@pytest.fixture(scope="session")
def planted_pilot(request_of, planted_folder: Path) -> dict[str, Any]:
    """The pilot of the learnable rows."""
    return run_pilot(request_of(hardware="H100-SXM", price=3.0), planted_folder)
