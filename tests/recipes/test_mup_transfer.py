"""The transfer study: its arguments, its schedule, a study that is killed, its report, and the check at a small size."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers.optimization import get_scheduler

from hf_moe_ext.mup import Cell, Sweep, read_cells, run_cells, summarize
from hf_moe_ext.mup.transfer_report import write_transfer_file

SMALL = {
    "values": "32 64",
    "modes": "mup none",
    "learning_rates": "2^-7 2^-5",
    "standard_learning_rates": "2^-7 2^-5",
    "seeds": "0",
    "max_steps": "6",
    "warmup_steps": "1",
    "num_held_out_rows": "8",
    "length": "16",
    "batch_size": "4",
}


def words(source_dir, folder, **changes):
    settings = {**SMALL, "source_dir": source_dir, "output_dir": folder, **changes}
    return [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())] + ["--use_cpu"]


def start(recipes, arguments):
    return subprocess.Popen(
        [sys.executable, str(recipes / "mup_transfer.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def losses(folder):
    return {Cell(**record["cell"]).name: record["loss"] for record in read_cells(folder / "cells")}


@pytest.fixture(scope="module")
def study(recipes, source_dir, tmp_path_factory):
    """A small study run to its end in this process, on one thread as the recipe's own processes are."""
    from mup_transfer import main
    from mup_transfer_arguments import build_sweep, parse_transfer_arguments
    from mup_transfer_training import TransferTraining

    folder, threads = tmp_path_factory.mktemp("study"), torch.get_num_threads()
    arguments = parse_transfer_arguments(words(source_dir, folder))
    torch.set_num_threads(1)
    try:
        run_cells(build_sweep(arguments), TransferTraining(arguments), folder / "cells")
    finally:
        torch.set_num_threads(threads)
    assert main([*words(source_dir, folder), "--report_only"]) == 0
    return folder


def test_a_study_leaves_cells_report_and_picture(study):
    folder = study
    found = losses(folder)
    assert len(found) == 8
    assert all(loss is not None for loss in found.values())
    # At the base all modes are the same training.
    assert found["mup-32-steps-6-seed-0-lr-0.03125"] == found["none-32-steps-6-seed-0-lr-0.03125"]
    assert found["mup-64-steps-6-seed-0-lr-0.03125"] != found["none-64-steps-6-seed-0-lr-0.03125"]
    results = json.loads((folder / "results.json").read_text())
    assert results["num_finished_cells"] == results["num_cells"] == 8
    assert results["arms"] == summarize(read_cells(folder / "cells"), 32)
    assert results["command"].startswith("python recipes/mup_transfer.py --values 32 64")
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "results.md").read_text()
    for mode in ("mup", "none"):
        for loss in (loss for name, loss in found.items() if name.startswith(f"{mode}-64")):
            assert f"{loss:.4f}" in card


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_cells(study, recipes, source_dir, tmp_path):
    arguments = words(source_dir, tmp_path, num_processes=2)
    process = start(recipes, arguments)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=100)  # the pipe ends when the last of its processes has left too
    begun = losses(tmp_path)
    assert 2 <= len(begun) < 8
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    process = start(recipes, arguments)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert "[8/8]" in output
    assert losses(tmp_path) == losses(study)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_a_report_of_the_cells_there_are(study, recipes, source_dir, tmp_path):
    from mup_transfer import main

    folder = study
    (tmp_path / "cells").mkdir()
    for path in folder.glob("cells/mup-*.json"):
        (tmp_path / "cells" / path.name).write_text(path.read_text())
    arguments = words(source_dir, tmp_path, report=tmp_path / "card" / "mup-transfer")
    assert main([*arguments, "--report_only"]) == 0
    assert "(4 of 8 cells are finished" in (tmp_path / "card" / "mup-transfer.md").read_text()
    assert len(list(tmp_path.glob("cells/*"))) == 4
    assert "report_only" not in (tmp_path / "card" / "mup-transfer.json").read_text()


def test_a_sweep_can_be_transferred_from(study, tmp_path):
    results = json.loads((study / "results.json").read_text())
    target = results["base_configs"]["mup"] | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16}
    target |= {"num_key_value_heads": 16, "logits_scaling": 8.0, "router_logits_scaling": 8.0}
    (tmp_path / "config.json").write_text(json.dumps(target))
    result = write_transfer_file(str(study), str(tmp_path / "config.json"), tmp_path / "out.yaml")
    (arm,) = (arm for arm in results["arms"] if arm["mode"] == "mup")
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert written["learning_rate"] == arm["base_learning_rate"]
    assert (written["max_steps"], written["adam_beta2"], written["max_length"]) == (6, 0.95, 16)
    assert written["lr_scheduler_kwargs"] == {"num_decay_steps": 2, "decay_type": "linear", "min_lr_ratio": 0.1}
    assert result.num_trials == 2  # two rates at the base
    assert [sentence.split(":")[0] for sentence in result.uncovered] == ["first scale of the embedding"]


def test_pretrain_takes_the_file_and_trains_with_mups_groups(recipes, source_dir, tmp_path):
    """From a small run of pretrain.py through the command's file to a run of the larger model."""
    from pretrain import main

    flags = {
        "model_type": "mixtral_ext", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "tokenizer_vocab_size": 300, "vocab_size": 320, "mup": "mup", "mup_base_hidden_size": 32, "max_length": 16,
        "learning_rate": 0.01, "weight_decay": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "per_device_train_batch_size": 2, "max_steps": 2,
    }  # fmt: skip
    common = {
        "source_dir": source_dir, "max_eval_samples": 4, "ngram_baseline": "false", "save_strategy": "no",
        "use_cpu": "true", "cache_dir": tmp_path,
    }  # fmt: skip

    def as_words(settings):
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(flags))
    small, large = tmp_path / "small", tmp_path / "large"
    assert main(["--config", str(tmp_path / "small.yaml"), *as_words(common), "--output_dir", str(small)]) == 0
    target = json.loads((small / "config.json").read_text())
    target |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    target |= {"logits_scaling": 2.0, "router_logits_scaling": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(target))
    write_transfer_file(str(small), str(tmp_path / "config.json"), tmp_path / "large.yaml")
    arguments = [
        "--config",
        str(tmp_path / "large.yaml"),
        *as_words(common | {"save_strategy": "steps", "save_steps": 2}),
    ]
    assert main([*arguments, "--tokenizer_vocab_size", "300", "--output_dir", str(large)]) == 0
    optimizer = torch.load(large / "checkpoint-2" / "optimizer.pt", weights_only=True)
    # Hidden weights at half the rate, with twice the decay; embedding, head and router at the rate itself.
    settings = {(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]}
    assert settings == {(0.01, 0.1), (0.005, 0.2), (0.01, 0.0)}


def test_pretrain_refuses_an_optimizer_that_mup_does_not_know(recipes, source_dir, tmp_path, capsys):
    from pretrain import main

    flags = [
        "--source_dir",
        str(source_dir),
        "--output_dir",
        str(tmp_path / "run"),
        "--mup",
        "mup",
        "--use_cpu",
        "true",
    ]
    flags += ["--mup_base_hidden_size", "256", "--tokenizer_vocab_size", "300", "--cache_dir", str(tmp_path)]
    assert main([*flags, "--optim", "adafactor"]) == 2
    assert "--optim adafactor with --mup mup: choose adamw_torch or adamw_torch_fused" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "depth"}, "invalid choice: 'depth'"),
        ({"learning_rates": "2^x"}, "must be a number or 2^k, got '2^x'"),
        ({"learning_rates": "0"}, "must be above 0, got '0'"),
        ({"values": "40"}, "num_attention_heads would be 2.5 in the copy for 40"),
        ({"values": "32 32"}, "nothing twice"),
        ({"num_processes": "0"}, "--num_processes must be at least 1, got 0"),
        ({"stable_until": "1.5"}, "--stable_until must be from 0 to 1, got 1.5"),
        ({"warmup_steps": "5"}, "--warmup_steps 5 must end before the rate comes down, at step 4 of --max_steps 6"),
        ({"base_hidden_size": "24"}, "--base_hidden_size must be a multiple of --head_dim 16, got 24"),
        ({"model_type": "olmoe_ext", "top_k": "9"}, "9 active experts of 8; top_k can be no more than num_experts"),
        ({"head_dim": "0"}, "--head_dim must be at least 1, got 0"),
        ({"num_hidden_layers": "0"}, "--num_hidden_layers must be at least 1, got 0"),
        ({"base_hidden_size": "0"}, "--base_hidden_size must be at least 1, got 0"),
        ({"num_experts": "0"}, "--num_experts must be at least 1, got 0"),
        ({"top_k": "0"}, "--top_k must be at least 1, got 0"),
        ({"intermediate_ratio": "-1"}, "--intermediate_ratio must be at least 1, got -1"),
        ({"initializer_range": "0"}, "--initializer_range must be a number above 0, got 0.0"),
        ({"embedding_std": "nan"}, "--embedding_std must be a number above 0, got nan"),
        ({"axis": "top_k", "hidden_size": "0", "values": "2"}, "--hidden_size must be at least 1, got 0"),
        ({"values": "0"}, "values must be positive numbers; got [0]"),
        ({"flag_that_is_not": "1"}, "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(recipes, source_dir, tmp_path, capsys, changes, message):
    from mup_transfer import main

    assert main(words(source_dir, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mup_transfer.py: error: ")
    assert not (tmp_path / "out").exists()


def test_cells_of_other_settings_are_refused(study, recipes, source_dir, capsys):
    from mup_transfer import main

    assert main(words(source_dir, study, batch_size=8)) == 2
    assert "made with settings 'batch_size' 4, not 8" in capsys.readouterr().err


def test_another_text_is_another_setting(study, recipes, tmp_path, capsys):
    from mup_transfer import main

    for i in range(40):
        (tmp_path / f"module_{i}.py").write_text(f"value_{i} = {'1' * 300}\n")
    assert main(words(tmp_path, study)) == 2
    assert "made with settings 'corpus'" in capsys.readouterr().err


def test_the_schedule_is_the_one_the_card_states(recipes, tmp_path):
    from mup_transfer_arguments import parse_transfer_arguments
    from mup_transfer_training import training_arguments

    args = training_arguments(parse_transfer_arguments([]), Cell("mup", 32, 0.5))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(150),
        args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    (factor,) = schedule.lr_lambdas
    expected = {0: 0.1, 10: 0.55, 20: 1.0, 89: 1.0, 90: 1.0, 120: 0.55, 150: 0.1}
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_rows_are_bytes_and_the_held_out_ones_are_of_other_modules(recipes, source_dir):
    from mup_transfer_training import cut_rows, read_rows

    assert cut_rows("aé" * 3, 4).tolist() == [[97, 195, 169, 97], [195, 169, 97, 195]]
    train, held_out = read_rows(str(source_dir), 16, 8)
    assert len(held_out) == 8
    assert train[0]["input_ids"].dtype == torch.int64
    assert bytes(train[0]["labels"].tolist()).decode().startswith('"""Module')


def test_the_model_starts_at_the_scales_of_the_study(recipes, source_dir, tmp_path):
    from mup_transfer_arguments import build_sweep, parse_transfer_arguments
    from mup_transfer_training import TransferTraining

    arguments = parse_transfer_arguments(words(source_dir, tmp_path, values="32 128"))
    sweep = build_sweep(arguments)
    assert isinstance(sweep, Sweep)
    for mode, hidden_std in (("none", 0.1), ("mup", 0.05)):
        cell = Cell(mode, 128, 2.0**-7, 0, 6)
        model = TransferTraining(arguments)(sweep.configure(cell), cell).model.model
        assert model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.03)
        assert model.layers[0].mlp.experts.gate_up_proj.std().item() == pytest.approx(hidden_std, rel=0.03)
        assert model.layers[0].mlp.gate.weight.std().item() == pytest.approx(0.1, rel=0.1)


def make_results(arms):
    return {"axis": "hidden_size", "arms": arms}


def make_arm(mode, regret, shift, spread=0.0, loss=2.0):
    optimum = {"learning_rate": 0.01, "loss": loss, "bracketed": True, "vertex_learning_rate": None}
    entry = {"value": 64, "losses": [[0.01, loss]], "optimum": optimum, "shift_steps": shift}
    entry |= {"regret": regret, "seed_spread": spread, "seeds": [0]}
    return {"mode": mode, "max_steps": 150, "base_value": 32, "base_learning_rate": 0.01, "values": [entry]}


@pytest.mark.parametrize(
    ("arm", "verdicts"),
    [
        (make_arm("mup", 0.02, 1), [True, True, True]),
        (make_arm("mup", 0.03, 1), [True, False, False]),
        (make_arm("mup", 0.03, -1, spread=0.02), [True, True, False]),
        (make_arm("mup", 0.0, -2), [False, True, True]),
        (make_arm("simplep", None, 0), [True, False]),
        (make_arm("none", 0.08, -3), [True]),
        (make_arm("none", 0.07, -3), [False]),
    ],
)
def test_the_card_judges_by_the_bars(recipes, arm, verdicts):
    from mup_transfer_card import judge

    assert [holds for *_, holds in judge(make_results([arm]))] == verdicts


def test_the_card_says_where_no_mup_tuned_by_itself_is_better(recipes):
    from mup_transfer_card import _compare_tuned

    arms = [make_arm("mup", 0.0, 0, loss=2.2), make_arm("none", 0.1, -2, loss=2.1)]
    (line,) = _compare_tuned(arms)
    assert "mup=none ends lower than mup=mup at 64" in line
    assert _compare_tuned([make_arm("mup", 0.0, 0, loss=2.0), arms[1]]) == []


def test_other_axes_have_no_bars(recipes):
    from mup_transfer_card import judge

    assert judge(make_results([make_arm("mup", 9.0, 5)]) | {"axis": "top_k"}) == []


@pytest.mark.slow
def test_the_best_rate_stays_with_mup_and_moves_without(recipes, tmp_path):
    """Widths 32 and 128, five rates, 150 steps, one seed, on the standard library's bytes.

    Seed 1: in the study of the card its regret is 0. Seed 0's is 0.0145 of the 0.02 allowed, which another processor's
    rounding or another Python's library could use up.
    """
    arguments = ["--values", "32", "128", "--modes", "mup", "none", "--num_processes", "2", "--use_cpu", "--seeds", "1"]
    arguments += ["--learning_rates", "2^-8", "2^-7", "2^-6", "2^-5", "2^-4", "--output_dir", str(tmp_path)]
    process = start(recipes, [*arguments, "--standard_learning_rates", "2^-9", "2^-8", "2^-7", "2^-6", "2^-5"])
    output, _ = process.communicate(timeout=590)
    assert process.returncode == 0, output
    arms = {arm["mode"]: arm["values"] for arm in json.loads((Path(tmp_path) / "results.json").read_text())["arms"]}
    (_, wide), (_, standard) = arms["mup"], arms["none"]
    assert abs(wide["shift_steps"]) <= 1
    assert wide["regret"] <= 0.02
    assert standard["regret"] >= 0.05
