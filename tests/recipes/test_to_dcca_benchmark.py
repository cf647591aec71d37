"""The conversion's benchmark: its plan, a run of every part in small, and a card that says what its JSON says."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support import zoo
from support.words import build_tokenizer

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

from to_dcca import parse_options, plan_cells  # noqa: E402  # after the path is set
from to_dcca_card import render_card  # noqa: E402

CARD = ROOT / "model_cards" / "to-dcca.md"


def test_every_cell_once():
    cells = plan_cells(parse_options([]))
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names))
    assert sum(cell.method == "svd" for cell in cells) == 5  # it draws nothing: one seed
    assert {cell.seed for cell in cells if cell.distill_steps} == {0, 1, 2}


def test_a_run_in_small(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(24):  # words that the tokenizer knows
        (texts / f"module_{i}.py").write_text(" ".join(f"w{3 + (i * j + j * j) % 90}" for j in range(200)))
    model = zoo.build("olmoe", max_position_embeddings=64)
    model.save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    flags = {
        **{"source": tmp_path / "source", "source_dir": texts, "work_dir": tmp_path / "work"},
        **{"card_dir": tmp_path / "cards", "sequence_length": 32, "num_tokens": 512, "distill_tokens": 512},
        **{"held_out_tokens": 256, "distill_steps": 2, "ratios": 0.5, "distill_ratios": 0.5, "seeds": 0},
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "benchmarks" / "to_dcca.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "cards" / "to-dcca.json").read_text())
    assert [(run["method"], run["distill_steps"]) for run in results["runs"]] == [
        ("data", 0),
        ("independent", 0),
        ("svd", 0),
        ("data", 2),
    ]
    assert results["runs"][3]["perplexity_distilled"] > 1
    assert (tmp_path / "cards" / "to-dcca.md").read_text() == render_card(results)


def test_the_committed_card_is_rendered_from_the_committed_numbers():
    assert CARD.read_text() == render_card(json.loads(CARD.with_suffix(".json").read_text()))
