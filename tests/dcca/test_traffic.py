"""What ``hf-moe traffic`` tells: by formula from a configuration, and beside it what a Trainer's run has sent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.dcca.meter import TrafficMeter
from hf_moe_ext.dcca.traffic import MoeLayer, TrafficError, compute_traffic, read_layers, read_measurement
from hf_moe_ext.dcca.traffic_callback import TrafficCallback, summarize, write_report
from hf_moe_ext.dcca.traffic_table import format_bytes
from hf_moe_ext.scaling.exchange import IMPLEMENTATIONS, INFERENCE, Exchange, expect_sent, layer_bytes
from support import traffic_ranks, zoo
from support.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    # torch 2.13 asks whoever starts processes from a process with threads to think twice.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)


def save_config(family: str, folder: Path, **changes: Any) -> str:
    families = {**zoo.FAMILIES, **zoo.REFUSED}
    families[family](**changes).save_pretrained(folder)
    return str(folder)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["traffic", *arguments])


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_layers_of_a_configuration(tmp_path, family):
    """As the model itself dispatches them: width, experts, choices; dense layers are left out."""
    changes = {"moe_latent_size": 8} if family == "nemotron_h" else {}
    layers = read_layers(save_config(family, tmp_path, **changes))
    names = {
        "olmoe": [0, 1], "mixtral": [0, 1], "gpt_oss": [0, 1], "qwen3_moe": [1, 2], "deepseek_v3": [1, 2],
        "nemotron_h": [1, 4],
    }  # fmt: skip
    assert [int(layer.name.split(".")[2]) for layer in layers] == names[family]
    shapes = {"mixtral": (4, 2), "gpt_oss": (4, 2), "qwen3_moe": (8, 2)}
    width = 8 if family == "nemotron_h" else 32
    assert {(layer.width, layer.hidden_size, layer.num_experts, layer.top_k) for layer in layers} == {
        (width, 32, *shapes.get(family, (8, 3)))
    }


def test_command_prints_the_formula(tmp_path):
    folder = save_config("nemotron_h", tmp_path, moe_latent_size=8)
    result = run("--config", f"{folder}/config.json", "--ep", "4", "--tokens", "100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for name in IMPLEMENTATIONS:
        exchange = Exchange(8, 8, 3, 4)
        sent = expect_sent(exchange, name, 100)
        one = layer_bytes(exchange, name, sent)
        mine = found["implementations"][name]
        assert len(mine["layers"]) == 2
        assert mine["layers"][0]["training"]["payload"] == one.payload
        assert mine["layers"][0]["forward"]["metadata"] == layer_bytes(exchange, name, sent, INFERENCE).metadata
        assert mine["layers"][0]["payload_ratio"] == 0.25
        assert mine["layers"][0]["training"]["payload"] * 4 == mine["layers"][0]["training_at_full_width"]["payload"]
        assert mine["step"]["payload"] == 2 * one.payload
        assert mine["step"]["num_collectives"] == 2 * one.num_collectives
    again = run("--config", folder, "--ep", "4", "--tokens", "100", "--json", "--recomputed", "--dtype", "float32")
    double = json.loads(again.stdout)["implementations"]["all_to_all"]["step"]["payload"]
    assert double == 3 * found["implementations"]["all_to_all"]["step"]["payload"]


def test_command_for_people(tmp_path):
    folder = save_config("olmoe", tmp_path)
    result = run("--config", folder, "--ep", "2", "--tokens", "64", "--implementation", "latent_all_to_all")
    assert result.exit_code == 0, result.output
    assert "model.layers.[0-1].mlp.experts: 2 layers, top-3 of 8 experts, width 32 of 32" in result.stdout
    assert "latent_all_to_all" in result.stdout
    step = compute_traffic(read_layers(folder), 2, 64).step_bytes("latent_all_to_all")
    assert f"payload {format_bytes(step.payload)} (1 of full width)" in result.stdout
    assert "14 all-to-alls" in result.stdout
    alone = run("--config", folder, "--ep", "1", "--tokens", "64")
    assert "nothing leaves the only rank" in alone.stdout


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("llama", ["--ep", "2", "--tokens", "8"], "has no expert-parallel plan"),
        ("olmoe", ["--ep", "3", "--tokens", "8"], "ep_size must divide the 8 experts of a layer, got ep_size=3; possible: 1, 2, 4, 8"),
        ("olmoe", ["--ep", "0", "--tokens", "8"], "--ep must be at least 1, got 0"),
        ("olmoe", ["--ep", "2", "--tokens", "-1"], "--tokens must be at least 1, got -1"),
        ("olmoe", ["--ep", "2", "--tokens", "8", "--measured", "/nowhere/traffic.json"], "No such file"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, family, arguments, message):
    result = run("--config", save_config(family, tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_what_is_no_model(tmp_path):
    with pytest.raises(TrafficError, match=r"has no config\.json"):
        read_layers(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(TrafficError, match="cannot be read"):
        read_layers(str(tmp_path))
    for text, message in (("{", "is not JSON"), ("[1]", "holds no"), ('{"format": "x"}', "holds no")):
        (tmp_path / "traffic.json").write_text(text)
        with pytest.raises(TrafficError, match=message):
            read_measurement(tmp_path / "traffic.json")


def test_dense_layers_of_a_moe_family(tmp_path):
    folder = save_config("qwen3_moe", tmp_path, mlp_only_layers=[0, 1, 2])
    with pytest.raises(TrafficError, match="every one is dense"):
        read_layers(folder)


def test_report_of_one_process(tmp_path):
    """Without a process group too; nothing was exchanged."""
    report = summarize(TrafficMeter(), 2)
    write_report(report, tmp_path / "new" / "traffic.json")
    assert read_measurement(tmp_path / "new" / "traffic.json") == report
    assert (report["world_size"], report["flows"]) == (1, [])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["traffic.json"]
    with pytest.raises(ValueError, match="num_steps must be at least 1, or None for all steps, got 0"):
        TrafficCallback(num_steps=0)


def test_measured_in_a_trainer(tmp_path):
    """Three of four steps are counted; the file holds the mean of both ranks and is shown beside the formula."""
    zoo.build("olmoe", dtype=torch.float64).save_pretrained(tmp_path / "base")
    ranks = run_ranks(traffic_ranks.trained, 2, tmp_path / "base", tmp_path / "out")
    report = read_measurement(tmp_path / "out" / "traffic.json")
    assert (report["num_steps"], report["world_size"]) == (3, 2)
    assert [found["steps"] for found in ranks] == [3, 3]
    for flow in report["flows"]:
        same = [
            next(f for f in found["flows"] if all(f[key] == flow[key] for key in ("kind", "direction", "pass")))
            for found in ranks
        ]
        for key in ("num_calls", "num_rows", "off_rank_bytes", "own_bytes"):
            assert flow[key] == pytest.approx(sum(f[key] for f in same) / 2 / 3, rel=1e-12), key
        assert flow["largest_rank_off_rank_bytes"] == max(f["off_rank_bytes"] for f in same) / 3
    calls = {(f["kind"], f["direction"], f["pass"]): f["num_calls"] for f in report["flows"]}
    layers, micro_batches = AutoConfig.from_pretrained(tmp_path / "base").num_hidden_layers, 2
    assert calls["payload", "dispatch", "forward"] == calls["payload", "dispatch", "backward"] == layers * micro_batches
    assert calls["metadata", "dispatch", "forward"] == 2 * layers * micro_batches
    shown = run("--config", str(tmp_path / "base"), "--ep", "2", "--tokens", "40", "--dtype", "float64",
                "--measured", str(tmp_path / "out" / "traffic.json"))  # fmt: skip
    assert shown.exit_code == 0, shown.output
    payload = sum(flow["off_rank_bytes"] for flow in report["flows"] if flow["kind"] == "payload")
    assert payload > 0
    assert f"measured per step: payload {format_bytes(payload)}" in shown.stdout


def test_layers_that_differ_stand_apart():
    layers = [MoeLayer(f"model.layers.{i}.mlp.experts", width, 32, 8, 2) for i, width in enumerate((32, 8, 8))]
    traffic = compute_traffic(layers, 2, 16, ("all_to_all",))
    payloads = [row.training.payload for row in traffic.layers["all_to_all"]]
    assert payloads[1] == payloads[2] == payloads[0] / 4
    assert [row.payload_ratio for row in traffic.layers["all_to_all"]] == [1.0, 0.25, 0.25]
