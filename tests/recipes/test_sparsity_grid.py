"""The sparsity grid: real training of its smallest setting, a grid that is killed, its table and card, and bad input."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_ext.scaling.exchange import RECOMPUTED
from hf_moe_ext.scaling.fit import DegenerateFitWarning, fit
from hf_moe_ext.scaling.fit_forms import FORMS
from hf_moe_ext.scaling.fit_solver import FitSettings
from hf_moe_ext.scaling.runs import read_runs
from hf_moe_ext.scaling.shape import MoeShape


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Nine questions with answers, one longer than a row."""
    path = tmp_path_factory.mktemp("questions") / "yes_no.jsonl"
    rows = [
        {"instruction": f"Is {i} even? " * (1 + 9 * (i == 3)), "output": "yes" if i % 2 == 0 else "no"}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(source_dir, folder, *more):
    return ["--smoke", "--use_cpu", "--source_dir", str(source_dir), "--output_dir", str(folder), *map(str, more)]


def run_all(arguments):
    """The cells in this process, on one thread as the recipe's own processes are; the grid's cells."""
    from sparsity_grid import choose_rates
    from sparsity_grid_arguments import describe_settings, list_grid_cells, list_search_cells
    from sparsity_grid_training import run_cell

    settings, folder, threads = describe_settings(arguments), arguments.output_dir / "cells", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        search = list_search_cells(arguments)
        found = {cell: run_cell(arguments, settings, folder, cell) for cell in search}
        grid = list_grid_cells(arguments, choose_rates(search, found))
        for cell in grid:
            run_cell(arguments, settings, folder, cell)
    finally:
        torch.set_num_threads(threads)
    return grid


@pytest.fixture(scope="module")
def study(recipes, source_dir, questions, tmp_path_factory):
    """The smallest grid, run to its end: 12 cells."""
    from sparsity_grid import main
    from sparsity_grid_arguments import parse_grid_arguments

    folder = tmp_path_factory.mktemp("grid")
    given = words(source_dir, folder, "--reasoning_file", questions)
    run_all(parse_grid_arguments(given))
    assert main([*given, "--report_only"]) == 0
    return folder


def read_table(folder):
    with (folder / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_row_is_a_run_of_the_stated_model_and_budget(study, recipes, source_dir):
    from sparsity_grid_arguments import GridCell, build_config, parse_grid_arguments

    arguments, rows = parse_grid_arguments(words(source_dir, study)), read_table(study)
    assert len(rows) == 2 * 3 * 1 * 2
    for row in rows:
        cell = GridCell(
            float(row["nominal_parameters"]), int(row["num_experts"]), float(row["budget_flops"]),
            float(row["learning_rate"]), int(row["seed"]),
        )  # fmt: skip
        config = build_config(cell, arguments)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = MoeShape.from_hf(config)
        assert int(row["total_parameters"]) == sum(p.numel() for p in model.parameters())
        assert abs(int(row["total_parameters"]) / cell.total_parameters - 1) <= 0.1
        assert float(row["sparsity"]) == 1 - 2 / cell.num_experts
        assert int(row["active_parameters"]) == shape.active_parameters
        assert int(row["num_tokens"]) == int(row["num_steps"]) * 4 * 32
        flops = shape.training_flops(32).total
        assert float(row["training_flops"]) == flops * int(row["num_tokens"])
        # The nearest whole number of steps.
        assert abs(float(row["training_flops"]) - cell.budget_flops) <= flops * 4 * 32 / 2
        assert float(row["bits_per_byte"]) == pytest.approx(float(row["loss"]) / math.log(2))
        assert 0 < float(row["loss"]) < math.log(256) + 1
        assert 0 < float(row["answer_loss_yes_no"]) < 10
        assert float(row["memory_formula_bytes"]) / float(row["memory_measured_bytes"]) == pytest.approx(1, abs=0.1)
        # Two ranks: dispatch and combine, forward and backward, half of the rows; 2 bytes, 2 experts, 2 layers.
        assert float(row["all_to_all_bytes_per_token"]) == 4 * config.hidden_size * 2 * 2 * 0.5 * 2
    assert len({row["loss"] for row in rows}) == len(rows)


def test_the_table_is_what_the_fitter_reads(study):
    for form in ("abnar", "chinchilla"):
        runs = read_runs(study / "runs.csv", (*FORMS[form].variables, "loss"))
        assert len(runs) == 12
        assert runs.tokenizer == "bytes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateFitWarning)  # twelve runs of seconds determine little
        assert fit("chinchilla", runs, FitSettings(num_starts=4, num_finalists=2)).degrees_of_freedom == 7


def test_the_card_holds_the_means_and_its_json_their_runs(study):
    results = json.loads((study / "results.json").read_text())
    card, rows = (study / "results.md").read_text(), read_table(study)
    assert results["num_finished_cells"] == results["num_cells"] == 12
    assert [run["loss"] for run in results["runs"]] == [float(row["loss"]) for row in rows]
    for group in results["groups"]:
        for point in group["points"]:
            losses = [
                float(row["loss"])
                for row in rows
                if float(row["nominal_parameters"]) == group["nominal_parameters"]
                and float(row["sparsity"]) == point["sparsity"]
            ]
            assert len(losses) == 2
            assert point["loss"] == pytest.approx(np.mean(losses))
            assert f"{point['loss']:.4f}" in card
    assert (study / "results.png").read_bytes().startswith(b"\x89PNG")
    assert results["command"].startswith("python recipes/sparsity_grid.py --smoke")
    assert "--reasoning_file yes_no.jsonl" in results["command"]


def test_one_cell_is_the_same_again(study, recipes, source_dir, questions):
    """Training is seeded: what a resumed grid adds is what an uninterrupted one had."""
    from sparsity_grid_arguments import GridCell, parse_grid_arguments
    from sparsity_grid_training import train_cell

    record = json.loads(next((study / "cells").glob("N-20000-E-4*seed-1.json")).read_text())
    arguments = parse_grid_arguments(words(source_dir, study, "--reasoning_file", questions))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = train_cell(GridCell(**record["cell"]), arguments)
    finally:
        torch.set_num_threads(threads)
    assert again == record["run"]


@pytest.mark.slow
def test_a_killed_grid_goes_on_to_the_same_cells(study, recipes, source_dir, questions, tmp_path):
    command = [sys.executable, str(recipes / "sparsity_grid.py"), "--num_processes", "2"]
    command += words(source_dir, tmp_path, "--reasoning_file", questions)
    settings = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **settings, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("cells/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=100)  # the pipe ends when the last of its processes has left too
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    assert 5 <= len(kept) < 15
    process = subprocess.Popen(command, **settings, text=True, start_new_session=True)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert "grid [12/12]" in output
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert {row["loss"] for row in read_table(tmp_path)} == {row["loss"] for row in read_table(study)}


def test_cells_of_other_settings_are_refused(study, recipes, source_dir, questions, capsys):
    from sparsity_grid import main

    given = words(source_dir, study, "--reasoning_file", questions, "--report_only")
    assert main([*given, "--batch_size", "8"]) == 2
    assert "made with batch_size 4, not 8" in capsys.readouterr().err
    assert main([*words(source_dir, study), "--report_only"]) == 2
    assert "made with reasoning {'yes_no.jsonl'" in capsys.readouterr().err


def test_a_report_without_cells_is_refused(recipes, source_dir, tmp_path, capsys):
    from sparsity_grid import main

    assert main([*words(source_dir, tmp_path / "none"), "--report_only"]) == 2
    assert "no finished run chooses the learning rate of 2 experts" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num_experts", "1", "4"), "--num_experts 1 is below --top_k 2. 2 experts are the dense equivalent"),
        (("--total_parameters", "9000"), "--total_parameters 9000 with 2 experts: the nearest model has"),
        (("--seeds", "0", "0"), "--seeds must hold nothing twice, got 0 0"),
        (("--seeds", "1000"), "--seeds must not hold 1000, the seed of the search"),
        (("--budget_flops", "nan"), "--budget_flops must be positive numbers, got nan"),
        (("--batch_size", "0"), "--batch_size must be at least 1, got 0"),
        (("--warmup_fraction", "0.9"), "--warmup_fraction 0.9 must not be above --stable_until 0.6"),
        (("--final_lr_ratio", "2"), "--final_lr_ratio must be from 0 to 1, got 2.0"),
        (("--learning_rates", "2^x"), "must be a number or 2^k, got '2^x'"),
        (("--reasoning_file", "nowhere.jsonl"), "--reasoning_file nowhere.jsonl is no file"),
        (("--flag_that_is_not", "1"), "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(recipes, source_dir, tmp_path, capsys, more, message):
    from sparsity_grid import main

    assert main(words(source_dir, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sparsity_grid.py: error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "cannot be read"),
        ('{"title": "no question"}\n', "has the columns title; one of these forms is needed"),
        ('{"text": "no question"}\n', "has no row with a question and an answer"),
        (json.dumps({"instruction": "why?", "output": "x" * 40}) + "\n", "--length 32 must be above the 40 bytes"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused_before_anything_runs(
    recipes, source_dir, tmp_path, capsys, text, message
):
    from sparsity_grid import main

    (tmp_path / "rows.jsonl").write_text(text)
    assert main(words(source_dir, tmp_path / "out", "--reasoning_file", tmp_path / "rows.jsonl")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--reasoning_file" in error or "--length" in error
    assert not (tmp_path / "out").exists()


def test_an_answer_keeps_the_end_of_its_question_and_scores_nothing_else(recipes, questions):
    from sparsity_grid_training import encode_answer, read_answers

    row = encode_answer("what is it? ", "this", 12)
    assert bytes(row["input_ids"]).decode() == "t is it? this"[-12:]
    assert row["labels"] == [-100] * 8 + list(b"this")
    short = {"input_ids": [*"é?".encode(), 97, 0, 0], "labels": [-100] * 3 + [97] + [-100] * 2}
    assert encode_answer("é?", "a", 6) == short
    rows = read_answers(questions, 5, 32)
    assert len(rows) == 5
    assert {len(ids) for ids in rows["input_ids"]} == {32}


def make_run(size, sparsity, budget, seed, loss, **more):
    run = {
        "nominal_parameters": size,
        "total_parameters": size,
        "sparsity": sparsity,
        "budget_flops": budget,
        "seed": seed,
    }
    run |= {"loss": loss, "active_parameters": size * (1 - sparsity), "num_tokens": 1e6, "num_steps": 10}
    return run | {"memory_formula_bytes": 1.0, "memory_measured_bytes": 1.0} | more


def bowl(size, sparsity, centre):
    return 2 + 0.1 * (-math.log2(1 - sparsity) - centre) ** 2 + 0.05 * math.log(size / 1e5) ** 2


SPARSITIES = (0.0, 0.5, 0.75, 0.875, 0.9375)


@pytest.mark.parametrize(
    ("centres", "verdict", "best"),
    [
        ((2, 2, 2), "interior", 0.75),
        ((0, 0, 0), "edge", 0.0),
        ((9, 9, 9), "edge", 0.9375),
        ((0, 2, 2), "unclear", None),
        ((0, 0, 1), "unclear", 0.0),
    ],
)
def test_the_verdict_needs_every_seed(recipes, centres, verdict, best):
    from sparsity_grid_summary import compare_sparsities

    runs = [
        make_run(1e5, s, 1e10, seed, bowl(1e5, s, centre)) for seed, centre in enumerate(centres) for s in SPARSITIES
    ]
    (group,) = compare_sparsities(runs)
    assert group["verdict"] == verdict
    if best is not None:
        assert group["best_sparsity"] == best
        gains = [bowl(1e5, 0, centre) - bowl(1e5, best, centre) for centre in centres]
        assert group["gain_over_dense"] == pytest.approx(
            {"mean": np.mean(gains), "low": min(gains), "high": max(gains)}
        )


def test_a_surface_finds_the_bottom_of_a_bowl(recipes):
    from sparsity_grid_summary import describe_surface

    runs = [
        make_run(size, s, 1e10, seed, bowl(size, s, 2.3))
        for seed in range(3)
        for size in (3e4, 6e4, 1.2e5, 2.4e5)
        for s in SPARSITIES
    ]
    surface = describe_surface(runs, 1e10)
    assert surface["rmse"] == pytest.approx(0, abs=1e-9)
    for best in surface["optima"]:
        assert best["best_sparsity"] == pytest.approx(1 - 2**-2.3, abs=1e-6)
        assert best["flags"] == []


def test_answers_at_equal_loss_have_the_slope_that_was_put_in(recipes):
    from sparsity_grid_summary import compare_answers

    draw = np.random.default_rng(0)
    runs = []
    for seed in range(3):
        for s in SPARSITIES:
            for size in (3e4, 6e4, 1.2e5):
                loss = bowl(size, s, 2) + draw.normal() * 0.01
                answer = 1 + 0.8 * loss + 0.1 * loss**2 - 0.07 * math.log(1 - s)
                runs.append(make_run(size, s, 1e10, seed, loss, answer_loss_x=answer))
    found = compare_answers(runs, "answer_loss_x")
    assert found["slope"] == pytest.approx(0.07)
    assert found["slope_of_seeds"] == pytest.approx([0.07] * 3)
    assert found["scatter"] == pytest.approx(0, abs=1e-9)


def test_a_group_that_is_not_whole_has_no_verdict(recipes):
    """The sparsest run of the second seed is missing: one seed is left to compare, which is none."""
    from sparsity_grid_summary import compare_sparsities, find_best_sizes

    runs = [make_run(n, s, 1e10, seed, bowl(n, s, 2)) for n in (1e5, 2e5) for seed in range(2) for s in SPARSITIES]
    assert [group["verdict"] for group in compare_sparsities(runs)] == ["interior", "interior"]
    assert len(find_best_sizes(runs)) == 5
    whole, missing = compare_sparsities(runs[:-1])
    assert (whole["verdict"], missing["verdict"], missing["num_seeds"]) == ("interior", "unfinished", 1)
    assert len(find_best_sizes([run for run in runs if run["nominal_parameters"] == 1e5 or run["sparsity"] > 0])) == 4


def test_the_exchange_is_the_package_s_formula(recipes):
    """Two ranks of a shape that is no test's: against the package's own bytes of a recomputed run less one forward."""
    from hf_moe_ext.scaling.exchange import INFERENCE, Exchange, expect_sent, layer_bytes
    from hf_moe_ext.scaling.feed_forward import MoeFfn
    from sparsity_grid_training import count_exchange_bytes

    shape = MoeShape.uniform(3, 64, MoeFfn(8, 2, 32), num_heads=4, vocab_size=256, context_length=64)
    exchange = Exchange(64, 8, 2, 4)
    sent = expect_sent(exchange, "all_to_all", 1)
    whole, once = (layer_bytes(exchange, "all_to_all", sent, passes).payload for passes in (RECOMPUTED, INFERENCE))
    assert count_exchange_bytes(shape, 4) == pytest.approx(3 * (whole - once))
    assert count_exchange_bytes(shape, 1) == 0
