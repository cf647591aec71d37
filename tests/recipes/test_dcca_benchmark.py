"""The benchmark in small, what its numbers mean, its cards, and namespaces that leave nothing behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
sys.path.insert(0, str(ROOT / "recipes" / "benchmarks"))

import dcca_card  # noqa: E402
from dcca_loss import compare_at_equal_time, list_arms, loss_at_step, read_curve, relative_difference  # noqa: E402
from dcca_presets import CPU4, PRESETS, SMOKE, ProbePreset, StepPreset  # noqa: E402
from dcca_probe import collect, fit_probe  # noqa: E402
from dcca_step import STOCK, build_model, built_models, choose_rate, list_pairs, summarize_step  # noqa: E402
from network_namespaces import INTERFACE, Lab, find_obstacle, make_lab  # noqa: E402

import dcca  # noqa: E402  # after the path is set


def test_the_interval_is_students_over_pairs() -> None:
    losses, reference = [4.04, 4.08, 4.06], [4.0, 4.0, 4.0]
    found = relative_difference(losses, reference)
    # Differences 1 %, 2 %, 1.5 %: mean 1.5 %, deviation 0.5 %, t(2) = 4.303.
    half = 4.303 * 0.005 / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.015)
    assert (found["low"], found["high"]) == pytest.approx((0.015 - half, 0.015 + half))
    assert relative_difference([2.0], [1.0]) == {"mean": 1.0, "seeds": 1}


def test_losses_at_equal_time_are_read_from_the_curves() -> None:
    log = [
        {"step": 10, "eval_nats_per_token": 4.0},
        {"step": 10, "loss": 9.0},
        {"step": 40, "eval_nats_per_token": 3.0},
    ]
    curve = read_curve(log)
    assert curve == [[10, 4.0], [40, 3.0]]
    assert loss_at_step(curve, 20) == pytest.approx(3.5)
    with pytest.raises(ValueError, match="from 10 to 40, got 41"):
        loss_at_step(curve, 41)
    arms = {"fast": {"curve": {"0": curve, "1": curve}}, "slow": {"curve": {"0": [[10, 4.0], [40, 2.0]]}}}
    found = compare_at_equal_time(arms, {"fast": 1.0, "slow": 2.0}, ("slow", "fast"), last_step=40)
    assert found["steps"] == {"slow": 20.0, "fast": 40.0}
    assert found["loss"] == {"slow": pytest.approx(3.0), "fast": 3.0}
    assert found["difference"]["seeds"] == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_arms_hold_equal_experts(preset: str) -> None:
    from dcca_loss import build_arm

    if preset == "gpu80":
        assert PRESETS[preset].loss == CPU4.loss
    counts = {}
    for name, flags in list_arms(PRESETS[preset].loss).items():
        with torch.device("meta"):
            model = build_arm(PRESETS[preset].loss, flags)
        counts[name] = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    gated = counts.pop("dcca r=1/4, gated experts", counts["standard"])
    assert len(set(counts.values())) == 1
    assert gated == pytest.approx(counts["standard"], rel=0.05)  # widths are rounded


def test_models_of_a_timing_route_alike_and_differ_in_width() -> None:
    preset = SMOKE.step
    with built_models(preset) as folders:
        from transformers import AutoModelForCausalLM

        models = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    chosen = {}
    for name, model in models.items():
        hook = model.model.layers[0].mlp.gate.register_forward_hook(
            lambda _, __, output, name=name: chosen.update({name: output[2]})
        )
        model(input_ids=torch.arange(3, 15)[None])
        hook.remove()
    assert torch.equal(chosen["standard"], chosen["dcca"])
    assert models["dcca"].model.layers[0].mlp.descend.weight.shape == (preset.latent_size, preset.hidden_size)
    assert not Path(folders["dcca"]).exists()


def test_the_timed_shapes_are_those_promised() -> None:
    step = CPU4.step
    assert step.hidden_size >= 1024
    assert (step.latent_size * 4, step.top_k, step.num_experts) == (step.hidden_size, 8, 64)
    assert step.num_ranks == (1, 2, 4)
    model = build_model(SMOKE.step, "dcca")
    assert type(model.model.layers[0].mlp).__name__ == "DccaMoeBlock"


def test_the_rate_makes_all_to_all_the_wanted_share() -> None:
    preset = StepPreset(link_batch_size=1, length=100, hidden_size=10, top_k=2, link_ranks=2, link_share=0.5)
    exchanged = 4 * 100 * 2 * 0.5 * 10 * 4
    other, computing = 1000, 2.0
    rate = choose_rate({"step": [2.5, 9.0], "exchange": [0.5, 0.6]}, int(exchanged) + other, preset)
    exchange, rest = exchanged / rate, computing + other / rate
    assert exchange / (exchange + rest) == pytest.approx(0.5)
    with pytest.raises(RuntimeError, match="no rate makes"):
        choose_rate({"step": [2.5], "exchange": [0.5]}, int(3 * exchanged), preset)


def test_ratios_are_taken_within_a_round() -> None:
    a, b = f"standard, {STOCK}", f"dcca, {STOCK}"
    seconds = {
        a: {"step": [1.0, 10.0, 4.0], "exchange": [0.4, 4.0, 1.6]},
        b: {"step": [0.5, 5.0, 2.0], "exchange": [0.1] * 3},
    }
    assert list_pairs(seconds) == [(b, a)]
    summary = summarize_step({"seconds": seconds, "facts": {a: {"exchanges": 5}}})
    assert summary["ratios"][f"step: {b} / {a}"] == {"low": 0.5, "median": 0.5, "high": 0.5}
    assert summary["arms"][a]["exchange_share"] == pytest.approx(0.4)
    assert summary["arms"][a]["exchanges"] == 5


def test_verdicts_hold_to_their_limits() -> None:
    def judge(exchange: float, step: float) -> dict[str, bool]:
        ratios = {f"{what}: dcca, {STOCK} / standard, {STOCK}": {"median": value, "low": 0, "high": 9}
                  for what, value in (("exchange", exchange), ("step", step))}  # fmt: skip
        return dcca_card.judge_step({"4": {"ratios": ratios}})

    assert list(judge(1 / 2.7, 1.0).values()) == [True, True]
    assert list(judge(1 / 2.69, 1.01).values()) == [False, False]
    ratios = {"step: dcca, all_to_all / standard, all_to_all": {"median": 0.5}}
    link = {"full_width_share": 0.85, "amdahl": 2.3, "ratios": ratios}
    assert list(dcca_card.judge_link(link).values()) == [True, True, True]
    assert list(dcca_card.judge_link({**link, "amdahl": 2.36, "full_width_share": 0.91}).values()) == [
        False,
        True,
        False,
    ]
    difference = {"mean": 0.01, "low": 0.0, "high": 0.0199}
    assert dcca_card.meets_loss_limit({"arms": {"dcca r=1/4": {"difference": difference}}})
    assert not dcca_card.meets_loss_limit({"arms": {"dcca r=1/4": {"difference": {**difference, "high": 0.02}}}})


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8, (1200,), generator=generator)
    marked = torch.eye(8)[ids] + 0.1 * torch.randn(1200, 8, generator=generator)
    noise = torch.randn(1200, 8, generator=generator)
    preset = ProbePreset(num_epochs=20, batch_size=64, learning_rate=1e-2)
    assert fit_probe(marked, ids, 900, 8, preset) > 0.95
    assert fit_probe(noise, ids, 900, 8, preset) < 0.3


def test_what_the_probe_reads_is_what_travels() -> None:
    model = build_model(SMOKE.step, "dcca").eval()
    rows = torch.arange(3, 35).view(4, 8)
    (wide, latent) = collect(model, rows, batch_size=2)["0"]
    assert wide.shape == (32, SMOKE.step.hidden_size)
    torch.testing.assert_close(latent, wide @ model.model.layers[0].mlp.descend.weight.T)


@pytest.mark.parametrize("name", ["dcca-pretrain", "dcca-speed"])
def test_the_committed_card_is_rendered_from_the_committed_numbers(name: str) -> None:
    path = ROOT / "model_cards" / f"{name}.json"
    render = {"dcca-pretrain": dcca_card.render_pretrain, "dcca-speed": dcca_card.render_speed}[name]
    assert path.with_suffix(".md").read_text() == render(json.loads(path.read_text()))


@pytest.mark.slow
def test_namespaces_are_joined_limited_and_gone() -> None:
    if (obstacle := find_obstacle()) is not None:
        pytest.skip(obstacle)
    with make_lab(2) as lab:
        assert _send(lab, 1000) == 1000
        lab.limit(1e6)
        shown = [*lab.enter(0), "tc", "qdisc", "show", "dev", INTERFACE]
        queue = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        assert queue.startswith("qdisc tbf")
        assert "rate 8Mbit" in queue
        assert _send(lab, 1_000_000) == 1_000_000
        holders = lab.holders
    assert not [pid for pid in holders if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_killed_benchmark_leaves_no_namespace() -> None:
    if (obstacle := find_obstacle()) is not None:
        pytest.skip(obstacle)
    code = "from network_namespaces import make_lab\nimport time\nwith make_lab(2) as lab:\n print(*lab.holders, flush=True)\n time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT / "recipes" / "benchmarks", stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    holders = [int(word) for word in process.stdout.readline().split()]
    assert len(holders) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(_runs(pid) for pid in holders) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in holders if _runs(pid)]


def _send(lab: Lab, count: int) -> int:
    """Bytes that arrive in the second rank's namespace of those sent from the first's."""
    place = f"('{lab.address(1)}', 5000)"
    serve = f"import socket; s = socket.create_server({place}); print('ready', flush=True); c, _ = s.accept(); "
    serve += "print(len(c.makefile('rb').read()))"
    send = f"import socket; c = socket.create_connection({place}); c.sendall(bytes({count})); c.close()"
    server = subprocess.Popen([*lab.enter(1), sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    subprocess.run([*lab.enter(0), sys.executable, "-c", send], check=True)
    arrived, _ = server.communicate(timeout=60)
    return int(arrived)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_every_part_in_small(source_dir: Path, tmp_path: Path, capsys) -> None:
    words = ["--preset", "smoke", "--jobs", "2", "--source_dir", str(source_dir), "--card_dir", str(tmp_path / "cards")]
    words += ["--work_dir", str(tmp_path / "work"), "--implementations", STOCK]
    for part in ("loss", "time", "probe", "step", "link", "decode", "bytes"):
        dcca.main([*words, "--part", part])
    pretrained, speed = (json.loads((tmp_path / "cards" / f"dcca-{n}.json").read_text()) for n in ("pretrain", "speed"))
    assert pretrained["runs"]["smoke"].keys() == {"loss", "time", "probe"}
    assert speed["runs"]["smoke"].keys() == {"step", "link", "decode", "bytes"}
    loss = pretrained["runs"]["smoke"]["loss"]
    assert loss["arms"].keys() == {"standard", "dcca r=1/4", "standard top-1"}
    assert len(loss["arms"]["standard"]["loss"]) == 2
    assert all(name in loss["command"] for name in ("dcca.py", "--preset smoke", "--part loss"))
    assert speed["runs"]["smoke"]["step"]["ranks"].keys() == {"1", "2"}
    exchanges = [arm["exchanges"] for arm in speed["runs"]["smoke"]["step"]["ranks"]["2"]["arms"].values()]
    assert exchanges == [5, 5]  # counts, out, back, and backward both
    link = speed["runs"]["smoke"]["link"]
    if "skipped" in link:
        assert link["skipped"] == find_obstacle()
        print(link["skipped"])
    else:
        assert 0 < link["full_width_share"] < 1
    for name in ("pretrain", "speed"):
        assert (tmp_path / "cards" / f"dcca-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Not met" in (tmp_path / "cards" / "dcca-speed.md").read_text() or "Met" in capsys.readouterr().out
    # A second time the finished runs are only read.
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("metrics.json")}
    dcca.main([*words, "--part", "loss"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("metrics.json")} == finished
