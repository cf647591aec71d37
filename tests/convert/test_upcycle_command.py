"""``hf-moe upcycle``: the same conversion from the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.convert import upcycle
from support.dense_models import save_dense


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["upcycle", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_equals_the_function(tmp_path: Path) -> None:
    """Every option, none at its default."""
    save_dense(tmp_path / "dense", "qwen3")
    options = (
        "--num-experts",
        "6",
        "--top-k",
        "3",
        "--layers",
        "0-1",
        "--delta",
        "sparse",
        "--rank",
        "3",
        "--bits",
        "8",
    )
    more = ("--drop-rate", "0.8", "--universal", "extend", "--router-std", "0.1", "--router-aux-loss-coef", "0.2")
    rest = ("--seed", "7", "--dtype", "bfloat16", "--max-shard-bytes", "20000", "--no-verify", "--json")
    code, out, error = run(str(tmp_path / "dense"), "--output", str(tmp_path / "cli"), *options, *more, *rest)
    assert code == 0, error
    report = json.loads(out)
    wanted = upcycle(
        *(tmp_path / "dense", tmp_path / "api"),
        **{"num_experts": 6, "top_k": 3, "layers": "0-1", "delta": "sparse", "rank": 3, "bits": 8, "drop_rate": 0.8},
        **{"universal": "extend", "router_std": 0.1, "router_aux_loss_coef": 0.2, "seed": 7, "dtype": "bfloat16"},
        **{"max_shard_bytes": 20_000, "verify": False},
    ).as_dict()
    for each in (report, wanted):
        del each["output"], each["seconds"]
    assert report == wanted
    names = {path.name for path in (tmp_path / "api").iterdir()}
    assert names == {path.name for path in (tmp_path / "cli").iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            one, other = load_file(tmp_path / "api" / name), load_file(tmp_path / "cli" / name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        elif name != "upcycle.json":
            assert (tmp_path / "api" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()


def test_text_and_overwriting(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "qwen3")
    command = (str(tmp_path / "dense"), "--output", str(tmp_path / "moe"))
    code, out, _ = run(*command, "--dry-run")
    assert code == 0
    assert "nothing written" in out
    assert not (tmp_path / "moe").exists()
    code, out, error = run(*command, "--no-norm-topk-prob", "--form", "vanilla")
    assert code == 0, error
    assert "warning: norm_topk_prob=False" in out
    assert f"written to {tmp_path / 'moe'}" in out
    code, _, error = run(*command)
    assert code == 2
    assert "hf-moe upcycle: output" in error
    code, out, _ = run(*command, "--overwrite")
    assert code == 0
    assert "logits equal the parent's" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-k", "9"), "top_k must be from 1 to num_experts=8"),
        (("--layers", "7"), "layers must be from 0 to 2"),
        (("--delta", "svd"), "low_rank"),
    ],
)
def test_mistakes(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    save_dense(tmp_path / "dense")
    code, _, error = run(str(tmp_path / "dense"), "--output", str(tmp_path / "moe"), *options)
    assert code == 2
    assert words in error
    assert "Traceback" not in error
