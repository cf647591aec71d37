"""Training arguments of a large model from a small one: what is taken over, counted, warned of and refused."""

import json
import pickle
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_moe_ext.cli import app
from hf_moe_ext.mup.small_run import TransferError, read_small_run
from hf_moe_ext.mup.transfer import compare_configs, transfer
from hf_moe_ext.mup.transfer_report import write_transfer_file
from hf_moe_ext.mup.tuning_cost import count_parameters, training_flops
from hf_moe_ext.mup.widening import add_experts, change, choose_top_k, cut_experts, widen
from support.latent_models import make_config

ARGUMENTS = {
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 40, "min_lr_ratio": 0.1},
    "warmup_steps": 10,
    "max_steps": 100,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_length": 64,
}


def make_small(**changes):
    return make_config("mixtral_ext", "standard", **({"mup": "mup", "mup_base_hidden_size": 32} | changes))


def write_run(folder, config=None, arguments=ARGUMENTS):
    (make_small() if config is None else config).save_pretrained(folder)
    metrics = {"settings": {"seed": 0}, "steps": 100} | ({} if arguments is None else {"training_arguments": arguments})
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write_target(folder, config=None):
    (widen(make_small(), 128) if config is None else config).save_pretrained(folder)
    return folder / "config.json"


def run_command(*words):
    return CliRunner().invoke(app, ["transfer", *map(str, words)])


def test_parameters_are_those_counted_by_hand():
    config = make_small(
        mup="none", mup_base_hidden_size=None
    )  # width 32, experts 8 of width 48, top-3, 4 heads, 2 of keys
    attention = 2 * 32 * 32 + 2 * 16 * 32
    expert, norms = 3 * 32 * 48, 2 * 32
    counted = count_parameters(config)
    assert counted.active == 2 * (attention + 8 * 32 + 3 * expert + norms) + 32
    vocabulary = 2 * config.vocab_size * 32
    assert counted.total == 2 * (attention + 8 * 32 + 8 * expert + norms) + 32 + vocabulary


def test_a_latent_block_counts_its_chosen_experts_and_all_of_its_projections():
    config = make_config("olmoe_ext", "ungated")
    latent, inner = config.moe_latent_size, config.moe_expert_intermediate_size
    difference = count_parameters(choose_top_k(config, 5)).active - count_parameters(config).active
    assert difference == 2 * 2 * 2 * latent * inner  # two layers, two experts more, two matrices each


def test_flops_are_six_per_parameter_and_token(tmp_path):
    assert training_flops(1_000, 50) == 300_000
    result = write_transfer_file(
        str(write_run(tmp_path / "small")), str(write_target(tmp_path / "large")), tmp_path / "out.yaml", num_trials=5
    )
    tokens = 100 * 8 * 2 * 64
    assert result.num_tokens == {"small": tokens, "target": tokens}
    for size, config in (("small", make_small()), ("target", widen(make_small(), 128))):
        assert result.tuning_flops[size] == 5 * 6 * count_parameters(config).active * tokens


def test_the_file_holds_the_tuned_numbers_and_the_targets_keys(tmp_path):
    target = write_target(tmp_path / "large")
    done = run_command("--from", write_run(tmp_path / "small"), "--to", target, "--output", tmp_path / "out.yaml")
    assert done.exit_code == 0, done.output
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert {name: written[name] for name in ARGUMENTS} == ARGUMENTS
    assert (written["model_type"], written["model_config"]) == ("mixtral_ext", str(target))
    assert (written["mup"], written["mup_base_hidden_size"], written["router_logits_scaling"]) == ("mup", 32, 4.0)
    assert "mup_base_latent_size" not in written
    assert "different here:\n  - nothing that the configurations tell" in done.output
    assert "6 x active non-embedding parameters x tokens" in done.output


def test_a_longer_run_keeps_the_shares_of_its_schedule_and_says_so(tmp_path):
    words = ["--from", write_run(tmp_path / "small"), "--to", write_target(tmp_path / "large")]
    done = run_command(
        *words, "--output", tmp_path / "out.yaml", "--max-steps", 300, "--batch-size", 4, "--max-length", 32
    )
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert (written["max_steps"], written["warmup_steps"]) == (300, 30)
    assert written["lr_scheduler_kwargs"] == {"num_decay_steps": 120, "min_lr_ratio": 0.1}
    for sentence in (
        "max_steps: 100 -> 300",
        "batch size (rows_per_step: 16 -> 8)",
        "sequence length (max_length: 64 -> 32)",
    ):
        assert sentence in done.output
        assert sentence in (tmp_path / "out.yaml").read_text()


def test_a_warm_up_that_is_a_share_stays_one(tmp_path):
    small = read_small_run(write_run(tmp_path / "small", arguments=ARGUMENTS | {"warmup_steps": 0.05}))
    assert transfer(small, widen(small.config, 64), "c.json", {"max_steps": 1000}).arguments["warmup_steps"] == 0.05


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (lambda c: change(c, {"num_hidden_layers": 4}), "depth"),
        (lambda c: add_experts(c, 16), "tested under simplep only (num_local_experts: 8 -> 16)"),
        (lambda c: choose_top_k(c, 4), "top-k: held fixed by the theory (num_experts_per_tok: 3 -> 4)"),
        (lambda c: cut_experts(c, 2), "granularity: how wide an expert is for the model"),
        (lambda c: change(c, {"vocab_size": 512}), "vocabulary"),
        (lambda c: change(c, {"initializer_range": 0.02}), "std of the first weights"),
        (lambda c: change(c, {"router_aux_loss_coef": 0.5}), "weight of the load-balance loss"),
        (lambda c: change(c, {"embedding_multiplier": 3.0}), "embedding multiplier"),
        (lambda c: change(c, {"tie_word_embeddings": True}), "tied embeddings"),
        (lambda c: change(c, {"num_key_value_heads": 4}), "how many heads share a key"),
        (lambda c: change(c, {"hidden_act": "gelu"}), "activation"),
    ],
)
def test_every_move_that_the_theory_does_not_cover_is_named(target, sentence):
    small = make_small()
    assert compare_configs(small, widen(small, 256)) == []
    assert any(sentence in found for found in compare_configs(small, target(small)))


def test_another_block_and_latent_are_named():
    small = make_config("olmoe_ext", "ungated", mup="mup", mup_base_hidden_size=32)
    found = compare_configs(small, change(widen(small, 64), {"moe_latent_size": 8, "mup_base_latent_size": 8}))
    assert any("how wide the latent is" in sentence for sentence in found)
    standard = make_config("olmoe_ext", "standard", mup="mup", mup_base_hidden_size=32)
    assert any("another MoE block" in sentence for sentence in compare_configs(small, standard))


@pytest.mark.parametrize(
    ("small", "target", "message"),
    [
        (
            make_config("mixtral_ext", "standard"),
            widen(make_small(), 64),
            "trained with mup='none': its learning rate says nothing about another width",
        ),
        (
            make_small(),
            widen(make_config("mixtral_ext", "standard"), 64),
            'the target has mup=\'none\'.* "mup": "mup", "mup_base_hidden_size": 32, "mup_base_intermediate_size": 48',
        ),
        (make_small(), make_small(mup_base_hidden_size=16), "mup_base_hidden_size must be the small run's, 32, got 16"),
        (
            make_small(),
            make_small(mup_base_intermediate_size=24),
            "mup_base_intermediate_size must be the small run's, 48",
        ),
        (make_small(), make_small(head_dim=16), "mup_base_head_dim must be the small run's, 8, got 16"),
        (make_small(), make_small(mup="simplep"), "mup must be the small run's, 'mup', got 'simplep'"),
    ],
)
def test_what_has_no_common_base_is_refused_and_nothing_is_written(tmp_path, small, target, message):
    run, target = write_run(tmp_path / "small", small), write_target(tmp_path / "large", target)
    with pytest.raises(TransferError, match=message):
        write_transfer_file(str(run), str(target), tmp_path / "out.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "small"]
    assert run_command("--from", run, "--to", target, "--output", tmp_path / "out.yaml").exit_code == 2


@pytest.mark.parametrize(
    ("small", "copied", "message"),
    [
        (
            {},
            {"logits_scaling": 1.0},
            r"got logits_scaling=1\.0 .*write logits_scaling=4\.0 there \(or leave out logits_sc",
        ),
        ({}, {"router_logits_scaling": 1.0}, r"got router_logits_scaling=1\.0 .*write router_logits_scaling=4\.0"),
        (
            {"logits_scaling": 0.5},
            {"logits_scaling": 0.5, "router_logits_scaling": 1.0},
            r"write logits_scaling=2\.0, router_logits_scaling=4\.0 there \(or leave out router_logits_scaling: ",
        ),
        ({"logits_scaling": 0.5}, {"logits_scaling": 4.0}, r"write logits_scaling=2\.0 there$"),
        ({"attention_multiplier": 1.0}, {"attention_multiplier": 0.5}, r"write attention_multiplier=1\.0 there$"),
        ({}, {"attention_multiplier": 8**-0.5 * (1 + 1e-6)}, f"write attention_multiplier={8**-0.5!r} there"),
        ({"mup": "simplep"}, {"router_logits_scaling": 4.0}, r"write router_logits_scaling=1\.0 there"),
        ({"mup_form": "folded"}, {"logits_scaling": 4.0}, r"write logits_scaling=1\.0 there"),
    ],
)
def test_multipliers_that_a_copied_file_holds_are_refused(tmp_path, small, copied, message):
    config = make_small(**small)
    run, target = write_run(tmp_path / "small", config), write_target(tmp_path / "large", widen(config, 128))
    write_transfer_file(str(run), str(target), tmp_path / "right.yaml")
    target.write_text(json.dumps(json.loads(target.read_text()) | copied))
    with pytest.raises(TransferError, match=message):
        write_transfer_file(str(run), str(target), tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_what_is_left_out_of_a_copied_file_follows_from_the_sizes(tmp_path):
    run, target = write_run(tmp_path / "small"), write_target(tmp_path / "large")
    keys = json.loads(target.read_text())
    for name in ("logits_scaling", "router_logits_scaling", "attention_multiplier"):
        del keys[name]
    target.write_text(json.dumps(keys))
    result = write_transfer_file(str(run), str(target), tmp_path / "out.yaml")
    assert (result.arguments["logits_scaling"], result.arguments["router_logits_scaling"]) == (4.0, 4.0)


def test_another_form_is_fine(tmp_path):
    small = read_small_run(write_run(tmp_path / "small"))
    target = widen(make_small(mup_form="folded"), 64)
    assert transfer(small, target, "c.json").arguments["mup_form"] == "folded"


def test_a_wider_head_of_the_same_base_is_covered(tmp_path):
    small = read_small_run(write_run(tmp_path / "small"))
    target = make_small(hidden_size=64, intermediate_size=96, head_dim=16, mup_base_head_dim=8)
    assert transfer(small, target, "c.json").uncovered == []


def test_what_is_missing_is_said_and_can_be_given(tmp_path):
    run, target = write_run(tmp_path / "small", arguments=None), write_target(tmp_path / "large")
    words = ["--from", run, "--to", target, "--output", tmp_path / "out.yaml"]
    done = run_command(*words)
    assert done.exit_code == 2
    assert "does not tell its learning rate: it needs metrics.json with 'training_arguments'" in done.output
    assert not (tmp_path / "out.yaml").exists()
    done = run_command(*words, "--learning-rate", "0.03", "--weight-decay", "0")
    assert "Trainer's defaults hold: adam_beta1, adam_beta2" in done.output
    assert "Tuning FLOPs are not known" in done.output
    written = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert (written["learning_rate"], written["weight_decay"]) == (0.03, 0)
    (tmp_path / "small.yaml").write_text("learning_rate: 1e-3\nmax_steps: 50\nmoe_block: standard\n")
    done = run_command(*words, "--arguments", tmp_path / "small.yaml", "--overwrite", "--json")
    assert json.loads(done.output)["arguments"]["learning_rate"] == 1e-3


def test_a_pickle_is_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    run = write_run(tmp_path / "small", arguments=None)
    (run / "training_args.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(TransferError, match=r"training_args\.bin is a pickle and is not read"):
        write_transfer_file(str(run), str(write_target(tmp_path / "large")), tmp_path / "out.yaml")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_tells_its_steps(tmp_path):
    make_small().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 70}))
    assert read_small_run(tmp_path).arguments == {"max_steps": 70}


def test_a_run_of_epochs_counts_the_steps_it_took(tmp_path):
    run = write_run(tmp_path, arguments=ARGUMENTS | {"max_steps": -1})
    assert read_small_run(run).arguments["max_steps"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "0"], "--learning-rate must be above 0, got 0.0"),
        (["--max-steps", "-5"], "--max-steps must be above 0, got -5"),
        (["--trials", "0"], "--trials must be above 0, got 0"),
    ],
)
def test_a_number_out_of_range_is_refused(tmp_path, words, message):
    done = run_command("--from", tmp_path, "--to", tmp_path, "--output", tmp_path / "out.yaml", *words)
    assert done.exit_code == 2
    assert message in done.output


def test_folders_and_files_that_are_none_are_named(tmp_path):
    with pytest.raises(TransferError, match=r"holds neither config.json .* nor results.json"):
        read_small_run(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": []}')
    with pytest.raises(TransferError, match="holds no arm with mup="):
        read_small_run(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(TransferError, match="must hold an object"):
        read_small_run(tmp_path)
    run = write_run(tmp_path / "small")
    with pytest.raises(TransferError, match="cannot be read"):
        write_transfer_file(str(run), str(tmp_path / "none.json"), tmp_path / "out.yaml")
    (tmp_path / "kept.yaml").write_text("mine")
    with pytest.raises(TransferError, match="is there already; name another file, or add --overwrite"):
        write_transfer_file(str(run), str(write_target(tmp_path / "large")), tmp_path / "kept.yaml")
    assert (tmp_path / "kept.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"training_arguments": [1]}, "'training_arguments' in .*metrics.json must be an object, it is \\[1\\]"),
        ({"settings": None}, "'settings' in .*metrics.json must be an object, it is null"),
        ({"training_arguments": {"learning_rate": "fast"}}, "learning_rate must be a number above 0, got 'fast'"),
        ({"training_arguments": {"learning_rate": float("nan")}}, "learning_rate must be a number above 0, got nan"),
        ({"training_arguments": {"learning_rate": float("inf")}}, "learning_rate must be a number above 0, got inf"),
        ({"training_arguments": {"learning_rate": -1}}, "learning_rate must be a number above 0, got -1"),
        ({"training_arguments": {"learning_rate": True}}, "learning_rate must be a number above 0, got True"),
        ({"training_arguments": {"weight_decay": -0.1}}, "weight_decay must be a number from 0, got -0.1"),
        ({"training_arguments": {"adam_beta2": 1}}, "adam_beta2 must be a number from 0 to below 1, got 1"),
        ({"training_arguments": {"optim": 3}}, "optim must be a name, got 3"),
        ({"training_arguments": {"max_steps": "x"}}, "max_steps must be a whole number from 1, got 'x'"),
        ({"training_arguments": {"max_steps": 2.5}}, "max_steps must be a whole number from 1, got 2.5"),
        ({"settings": {"max_length": 0}, "training_arguments": {}}, "max_length must be a whole number from 1, got 0"),
        ({"steps": [3], "training_arguments": {}}, "max_steps must be a whole number from 1, got \\[3\\]"),
        (
            {"training_arguments": {"lr_scheduler_kwargs": {"num_decay_steps": "x"}}},
            "lr_scheduler_kwargs must be 'key: value' pairs, whole numbers for num_decay_steps",
        ),
    ],
)
def test_a_bad_number_of_the_small_run_is_named_and_nothing_is_written(tmp_path, metrics, message):
    run, target = write_run(tmp_path / "small"), write_target(tmp_path / "large")
    (run / "metrics.json").write_text(json.dumps(metrics))
    arguments = tmp_path / "more.yaml"
    arguments.write_text("" if "learning_rate" in message else "learning_rate: 0.01\n")
    given = {} if "learning_rate" in message else {"arguments_file": arguments}
    with pytest.raises(TransferError, match=message):
        write_transfer_file(str(run), str(target), tmp_path / "out.yaml", changes={"max_steps": 300}, **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "more.yaml", "small"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("max_steps: lots", "max_steps must be a whole number from 1, got 'lots' in the training arguments of"),
        ("lr_scheduler_kwargs: hello", "lr_scheduler_kwargs must be 'key: value' pairs"),
        ("learning_rate: .nan", "learning_rate must be a number above 0, got nan"),
        ("warmup_steps: -1", "warmup_steps must be a number from 0, got -1"),
        ("warmup_steps: 2026-13-45", "cannot be read: month must be in 1..12"),
    ],
)
def test_a_bad_number_in_an_arguments_file_is_exit_code_2(tmp_path, lines, message):
    run, target = write_run(tmp_path / "small"), write_target(tmp_path / "large")
    (tmp_path / "more.yaml").write_text(lines)
    words = ["--from", run, "--to", target, "--output", tmp_path / "out.yaml", "--arguments", tmp_path / "more.yaml"]
    done = run_command(*words, "--max-steps", 300)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out.yaml").exists()


def test_whole_numbers_are_written_as_such_and_open_steps_are_not_known(tmp_path):
    run, target = (
        write_run(tmp_path / "small", arguments=ARGUMENTS | {"max_length": 64.0}),
        write_target(tmp_path / "l"),
    )
    (tmp_path / "more.yaml").write_text("per_device_train_batch_size: 1e1\nmax_steps: -1\n")
    result = write_transfer_file(
        str(run), str(target), tmp_path / "out.yaml", arguments_file=tmp_path / "more.yaml", changes={"max_length": 8}
    )
    assert "per_device_train_batch_size: 10\n" in (tmp_path / "out.yaml").read_text()
    assert (result.arguments["max_length"], result.arguments["max_steps"]) == (8, 100)


def test_an_output_that_cannot_be_a_file_is_refused_and_no_partial_file_stays(tmp_path, monkeypatch):
    run, target = write_run(tmp_path / "small"), write_target(tmp_path / "large")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    words = ["--from", run, "--to", target, "--overwrite", "--output"]
    for output, message in (
        (tmp_path / "folder", "--output must be a file to write, got the folder"),
        (tmp_path / "file" / "out.yaml", "is a file; name another place"),
    ):
        done = run_command(*words, output)
        assert done.exit_code == 2
        assert message in done.output

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    done = run_command(*words, tmp_path / "file")
    assert done.exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "large", "small"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"mup": "wide"}, "mup must be one of"),
        ({"num_key_value_heads": 3, "hidden_act": "none such"}, "no model can be built of the configuration"),
    ],
)
@pytest.mark.parametrize("side", ["small", "large"])
def test_an_invalid_configuration_is_one_line(tmp_path, side, changes, message):
    run, target = write_run(tmp_path / "small"), write_target(tmp_path / "large")
    path = tmp_path / side / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    done = run_command("--from", run, "--to", target, "--output", tmp_path / "out.yaml")
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"base_configs": {"mup": {"model_type": "mixtral_ext", "hidden_size": "abc"}}}, "expected int, got str"),
        (
            {"base_configs": {"mup": {"model_type": "mixtral_ext", "num_attention_heads": 0}}},
            "must be at least 1, got 0",
        ),
        ({"base_configs": [1]}, "is no result of recipes/mup_transfer.py"),
        ({"settings": None}, "'settings' in .* must be an object"),
        ({"training_arguments": [1]}, "is no result of recipes/mup_transfer.py"),
    ],
)
def test_a_spoilt_result_of_a_sweep_is_named(tmp_path, part, message):
    results = {
        "arms": [{"mode": "mup", "base_learning_rate": 0.01, "max_steps": 6, "base_value": 32}],
        "base_configs": {"mup": make_small().to_dict()},
        "training_arguments": ARGUMENTS,
        "cells": [],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert read_small_run(tmp_path).arguments["learning_rate"] == 0.01
    (tmp_path / "results.json").write_text(json.dumps(results | part))
    with pytest.raises(TransferError, match=message):
        read_small_run(tmp_path)
