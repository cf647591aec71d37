"""Reading runs: CSV, JSON, exports of Weights & Biases; and the published file."""

import json

import numpy as np
import pytest

from hf_moe_ext.scaling.laws import abnar, routed
from hf_moe_ext.scaling.runs import RunsError, make_runs, read_runs
from support.deepmind_runs import ROUTERS, needs_data, read_rows, standard_runs

ROWS = [{"n": 1e6, "d": 2e9, "loss": 3.5, "tokenizer": "gpt2"}, {"n": 2e6, "d": 3e9, "loss": 3.25, "tokenizer": "gpt2"}]
NAMES = {"total_parameters": "n", "num_tokens": "d", "loss": "loss"}


def write(folder, rows, name):
    path = folder / name
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    elif name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["runs.csv", "runs.json", "runs.jsonl"])
def test_reads_columns_under_our_names(tmp_path, name):
    runs = read_runs(write(tmp_path, ROWS, name), NAMES)
    assert len(runs) == 2
    assert runs.tokenizer == "gpt2"
    np.testing.assert_array_equal(runs["total_parameters"], [1e6, 2e6])
    np.testing.assert_array_equal(runs["loss"], [3.5, 3.25])
    assert len(read_runs(tmp_path / name, ["n", "loss"], select={"d": 3e9})) == 1
    assert len(read_runs(tmp_path / name, ["n", "loss"], select={"d": [2e9, 3e9], "tokenizer": "gpt2"})) == 2


def test_reads_an_export_of_weights_and_biases(tmp_path):
    rows = [
        {"name": f"run-{i}", "config": {"n": {"value": 1e6 * i}, "tokenizer_name": "gpt2", "optim": {"lr": 1e-3}},
         "summary": {"eval/loss": 3 + 1 / i, "_runtime": 7}}
        for i in (1, 2)
    ]  # fmt: skip
    path = write(tmp_path, rows, "export.json")
    runs = read_runs(path, {"total_parameters": "n", "loss": "eval/loss", "rate": "config.optim.lr"})
    np.testing.assert_array_equal(runs["loss"], [4, 3.5])
    np.testing.assert_array_equal(runs["total_parameters"], [1e6, 2e6])
    assert runs.tokenizer == "gpt2"
    twice = [{"config": {"loss": 1}, "summary": {"loss": 2}}]
    with pytest.raises(RunsError, match=r"'loss' is ambiguous: config\.loss, summary\.loss"):
        read_runs(write(tmp_path, twice, "twice.json"), ["loss"])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], ["n"], "has no runs; nothing to fit"),
        (ROWS, ["n", "perplexity"], "column 'perplexity' is missing; there are: n, d, loss, tokenizer"),
        ([*ROWS, {**ROWS[0], "tokenizer": "llama"}], ["n"], "runs of 2 tokenizers [(]gpt2, llama[)] cannot go"),
        (
            [ROWS[0], {**ROWS[1], "loss": float("nan")}],
            ["loss"],
            r"column 'loss' has no finite number in row 1 \(nan\)",
        ),
        ([{**ROWS[0], "loss": "diverged"}], ["loss"], r"no finite number in row 0 \('diverged'\)"),
        ([{**ROWS[0], "loss": None}] * 7, ["loss"], "and 2 more"),
        ([3], ["n"], "must be a list of objects"),
    ],
)
def test_refuses_runs(tmp_path, rows, columns, message):
    with pytest.raises(RunsError, match=message):
        read_runs(write(tmp_path, rows, "runs.json"), columns)


def test_refuses_files(tmp_path):
    (tmp_path / "runs.json").write_text("{")
    with pytest.raises(RunsError, match="not valid JSON"):
        read_runs(tmp_path / "runs.json", ["n"])
    (tmp_path / "runs.txt").write_text("")
    with pytest.raises(RunsError, match=r"read from \.csv, \.json or \.jsonl, got '\.txt'"):
        read_runs(tmp_path / "runs.txt", ["n"])
    with pytest.raises(OSError, match="absent"):
        read_runs(tmp_path / "absent.csv", ["n"])
    with pytest.raises(RunsError, match="differ in length: n 2, loss 1"):
        make_runs({"n": [1, 2], "loss": [3]})
    with pytest.raises(RunsError, match="no runs with"):
        read_runs(write(tmp_path, ROWS, "some.csv"), ["n"], select={"d": 5})


# --- The published file -----------------------------------------------------------------------------------------------


@needs_data
def test_identities_of_the_published_file():
    rows = read_rows()
    assert len(rows) == 221
    kinds = [row["router_type"] for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"Dense": 13, "Hash": 69, "RL-R": 53, "S-Base": 86}
    assert sum(float(row["S_experts"]) < 0 for row in rows) == 5
    assert sum(row["router_type"] == "Dense" and float(row["flop_increase"]) > 1 for row in rows) == 5
    assert all(1.9991 <= round(float(row["loss_validation"]), 4) <= 3.1620 for row in rows)
    for row in rows:
        kind = row["router_type"]
        d, blocks = int(row["d_model"]), int(row["num_blocks"])
        heads = int(row["num_heads"]) * int(row["kqv_size"])
        dense = blocks * (8 * d * d + 5 * d * heads + 4 * d)
        assert dense == float(row["dense_parameter_count"])
        routed_blocks = float(row["routing_frequency"]) * blocks
        copies = float(row["flop_increase"]) if kind == "Dense" else int(row["num_experts"])
        extra = (copies - 1) * 8 * d * d + (copies > 1) * copies * d + (kind == "RL-R") * (d / 8) * (d + 1)
        assert dense + routed_blocks * extra == pytest.approx(float(row["total_parameter_count"]), abs=1e-6, rel=1e-12)


@needs_data
@pytest.mark.parametrize(
    ("router", "num_routed", "rmse", "bias"),
    [("S-Base", 52, 0.0216, 0.010), ("RL-R", 53, 0.0439, 0.038), ("Hash", 51, 0.0308, -0.023)],
)
def test_published_coefficients_on_the_published_runs(router, num_routed, rmse, bias):
    runs = standard_runs(router)
    runs = runs.keep(runs["is_dense"] == 0)
    assert len(runs) == num_routed
    error = routed.ROUTERS[router].loss(runs["dense_parameters"], runs["num_experts"]) - runs["loss"]
    assert abs(np.sqrt(np.mean(error**2)) - rmse) < 1e-4
    assert abs(error.mean() - bias) < 1e-3


@needs_data
def test_printed_coefficients_of_abnar_only_rank_these_runs():
    for router in ROUTERS:
        runs = standard_runs(router)
        runs = runs.keep(runs["is_dense"] == 0)
        predicted = abnar.loss(runs["total_parameters"], 131e9, runs["sparsity"])
        assert 0.992 <= round(np.corrcoef(predicted, runs["loss"])[0, 1], 3) <= 0.993
        assert 0.104 < (predicted - runs["loss"]).mean() < 0.163
