"""Pre-training: keys, mistakes, small runs of both families and blocks, a killed run, and two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain
from finetune_arguments import UserError
from hf_moe_ext.row_losses import RowLosses
from pretrain_arguments import parse_pretrain_arguments
from pretrain_data import Texts, pack
from pretrain_model import build_config, describe_model

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture(scope="session")
def tokenizer_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' trained tokenizer is kept."""
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def flags(source_dir: Path, tokenizer_cache: Path) -> list[str]:
    """The default run with everything small."""
    settings = {
        "source_dir": source_dir, "cache_dir": tokenizer_cache, "tokenizer_vocab_size": 300, "hidden_size": 32,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_latent_size": 8, "max_length": 24, "max_steps": 6,
        "warmup_steps": 1, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": "{}", "logging_steps": 1,
        "save_steps": 3, "per_device_train_batch_size": 2, "max_eval_samples": 8, "use_cpu": True,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What was saved; a tied head, which Transformers writes again for a split model, is left out."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight", None)
    assert head is None or torch.equal(head, tensors["model.embed_tokens.weight"])
    return tensors


def assert_same_model(a: Path, b: Path, tolerance: float) -> None:
    first, second = read_tensors(a), read_tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=tolerance, rtol=0, msg=name)


def test_the_shipped_files_differ_in_the_block_alone_and_hold_equal_experts() -> None:
    kinds = {}
    for block in ("standard", "dcca"):
        arguments = parse_pretrain_arguments(["--config", str(CONFIGS / f"pretrain_{block}.yaml")])
        kinds[block] = (arguments, describe_model(build_config(arguments)))
        assert arguments.config_keys["moe_block"] == block
    (a, standard), (b, dcca) = kinds["standard"], kinds["dcca"]
    assert {k: v for k, v in b.config_keys.items() if k not in ("moe_block", "moe_latent_size")} == {
        k: v for k, v in a.config_keys.items() if k != "moe_block"
    }
    assert a.training.learning_rate == b.training.learning_rate
    assert standard["parameters_by_part"]["experts"] == dcca["parameters_by_part"]["experts"]
    assert standard["parameters_by_part"]["projections"] == 0
    assert dcca["parameters_by_part"]["projections"] == 2 * 2 * 256 * 64  # layers, descend and ascend
    assert parse_pretrain_arguments([]).config_keys == b.config_keys  # the default


def test_keys_of_a_file_and_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral_ext", "hidden_size": 64, "architectures": ["X"], "rms_norm_eps": "1e-6"})
    )
    words = ["--model_config", str(tmp_path / "config.json"), "--hidden_size", "32", "--moe_expert_gated", "true"]
    arguments = parse_pretrain_arguments([*words, "--moe_block", "dcca", "standard", "--num_hidden_layers=2"])
    assert arguments.model.model_type == "mixtral_ext"
    assert arguments.config_keys == {
        "hidden_size": 32, "rms_norm_eps": 1e-6, "moe_expert_gated": True, "moe_block": ["dcca", "standard"],
        "num_hidden_layers": 2,
    }  # fmt: skip
    assert build_config(arguments).moe_blocks == ["dcca", "standard"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moe_blok", "dcca"], ["Unknown argument --moe_blok", "--moe_block"]),
        (["--moe_block", "mlp"], ["moe_block must be one of", "'mlp'"]),
        (["--moe_latent_size", "0"], ["moe_latent_size must be from 1", "got 0"]),
        (["--moe_latent_size", "x"], ["moe_latent_size", "'x'"]),
        (["--num_local_experts_", "4"], ["Unknown argument"]),
        (["--model_config", "missing.json"], ["--model_config missing.json cannot be read"]),
        (["--model_config", "stock.json"], ["model_type must be olmoe_ext or mixtral_ext", "'llama'"]),
        (["--model_config", "ours.json", "--model_type", "mixtral_ext"], ["mixtral_ext", "contradict each other"]),
        (["--model_config", "typo.yaml"], ["no configuration key 'hiden_size'", "hidden_size"]),
        (["--sliding_window", "8"], ["olmoe_ext has no configuration key 'sliding_window'"]),
        (["--ep_size", "2", "--save_strategy", "no"], ["--ep_size 2", "number of processes, which is 1"]),
        (["--max_length", "1"], ["--max_length must be at least 2, got 1"]),
        (["--source_dir", "nowhere"], ["--source_dir nowhere gives 0 train"]),
        (["--dataset_name", "nowhere.jsonl"], ["--dataset_name nowhere.jsonl", "no such file"]),
        (["--tokenizer_name_or_path", "./nowhere"], ["--tokenizer_name_or_path ./nowhere cannot be loaded"]),
        (["--num_attention_heads", "3", "--hidden_size", "32"], ["The model's configuration"]),
        (["--mup", "mup"], ["mup='mup' needs mup_base_hidden_size"]),
        (
            [
                "--mup=mup",
                "--mup_base_hidden_size=64",
                "--lr_scheduler_type=greedy",
                "--eval_strategy=steps",
                "--eval_steps=2",
            ],
            ["--mup mup: lr_scheduler_type='greedy' holds every group above min_lr"],
        ),
        (["--resume_from_checkpoint", "nowhere"], ["--resume_from_checkpoint nowhere", "trainer_state.json"]),
    ],
    ids=lambda value: "-".join(value)[:40],
)
def test_mistakes_exit_with_two_and_write_nothing(
    words: list[str], said: list[str], source_dir: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stock.json").write_text('{"model_type": "llama"}')
    (tmp_path / "ours.json").write_text('{"model_type": "olmoe_ext"}')
    (tmp_path / "typo.yaml").write_text("hiden_size: 8\n")
    before = sorted(tmp_path.rglob("*"))
    assert pretrain.main([f"--source_dir={source_dir}", "--use_cpu", "--output_dir", "out/run", *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pretrain.py: error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in said), lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(flags: list[str], tmp_path: Path, capfd) -> None:
    assert pretrain.main([*flags, "--vocab_size=200", "--output_dir", str(tmp_path / "run")]) == 2
    assert "--vocab_size 200 is less than the tokenizer's 300 entries" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_whole_run_in_small(flags: list[str], tokenizer_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--eval_strategy=steps", "--eval_steps=2", "--max_curve_samples=4"]
    assert pretrain.main([*flags, *more, "--output_dir", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["loss"]["after"] < metrics["loss"]["before"] == pytest.approx(np.log(300), rel=0.05)
    assert metrics["model"]["parameters_by_part"]["projections"] == 2 * 2 * 32 * 8
    assert metrics["model"]["parameters"] == sum(metrics["model"]["parameters_by_part"].values())
    assert metrics["tokens_per_step"] == 48
    assert metrics["samples_per_second"] > 0
    assert metrics["bits_per_byte"].keys() == {"before", "after", "order_3_ngram"}
    assert metrics["bits_per_byte"]["after"] < metrics["bits_per_byte"]["before"]
    assert [entry["step"] for entry in metrics["log"] if "eval_nats_per_token" in entry] == [2, 4, 6]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "order 3 ngram" in (folder / "README.md").read_text()
    assert not list(folder.glob(".building-*"))
    assert len(list(tokenizer_cache.glob("pretrain-tokenizer-*"))) == 1

    # What was saved is what was measured.
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "OlmoeExtForCausalLM"
    assert type(model.model.layers[0].mlp).__name__ == "DccaMoeBlock"
    assert model.config.use_cache
    arguments = parse_pretrain_arguments([*flags, "--output_dir", str(folder)])
    texts = pretrain.read_texts(arguments)
    rows = pack(texts, AutoTokenizer.from_pretrained(folder), arguments).held_out
    nats = tokens = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += (labels[1:] != -100).sum().item()
    assert metrics["loss"]["after"] == pytest.approx(nats / tokens, abs=1e-5)


def test_the_other_family_another_file_and_blocks_by_layer(flags: list[str], tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"number {i} is followed by {i + 1}\n" * 3}) + "\n" for i in range(60))
    (tmp_path / "rows.jsonl").write_text(rows)
    more = [
        "--model_type=mixtral_ext", "--moe_block", "standard", "dcca", "--moe_latent_norm=true", "--ngram_baseline=false",
        f"--dataset_name={tmp_path / 'rows.jsonl'}", f"--cache_dir={tmp_path}", "--tokenizer_vocab_size=270",
        "--experts_implementation=eager",
    ]  # fmt: skip
    words = [flag.replace("--num_experts=", "--num_local_experts=") for flag in flags]
    (tmp_path / "base.yaml").write_text("output_router_logits: true\n")
    words = [*words, *more, f"--config={tmp_path / 'base.yaml'}", "--output_dir", str(tmp_path / "run")]
    assert pretrain.main(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["model"]["moe_block"] == ["standard", "dcca"]
    assert metrics["model"]["num_local_experts"] == 4
    assert metrics["loss"]["after"] < metrics["loss"]["before"]
    assert "order_3_ngram" not in metrics["bits_per_byte"]


def test_two_blocks_with_one_seed_read_the_same_rows_in_the_same_order(
    flags: list[str], tmp_path: Path, monkeypatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    build = pretrain.build_trainer

    def build_watched(*arguments):
        trainer = build(*arguments)
        collate, rows = trainer.data_collator, seen.setdefault(arguments[0].config_keys["moe_block"], [])

        def watch(features):
            batch = collate(features)
            if trainer.model.training:
                rows.extend(batch["input_ids"].tolist())
            return batch

        trainer.data_collator = watch
        return trainer

    monkeypatch.setattr(pretrain, "build_trainer", build_watched)
    for block in ("standard", "dcca"):
        words = [*flags, f"--moe_block={block}", "--ngram_baseline=false", "--output_dir", str(tmp_path / block)]
        assert pretrain.main([w for w in words if block == "dcca" or "latent_size" not in w]) == 0
    assert len(seen["dcca"]) >= 10
    assert seen["dcca"] == seen["standard"]
    assert len({tuple(row) for row in seen["dcca"]}) > 5


def test_mup_is_trained_with_its_own_groups(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    trainers, build = [], pretrain.build_trainer
    monkeypatch.setattr(pretrain, "build_trainer", lambda *arguments: trainers.append(build(*arguments)) or trainers[0])
    words = [*flags, "--mup=mup", "--mup_base_hidden_size=8", "--learning_rate=0.01", "--ngram_baseline=false"]
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    (trainer,) = trainers
    factors = {group["lr_factor"] for group in trainer.optimizer.param_groups}
    assert factors == {1.0, 8 / trainer.model.config.hidden_size}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["model"]["mup"], metrics["model"]["mup_base_hidden_size"]) == ("mup", 8)
    assert metrics["loss"]["after"] < metrics["loss"]["before"]


def test_rows_predict_every_token_once_and_bytes_are_those_of_the_text(tokenizer, tmp_path: Path) -> None:
    texts = Texts(("first text", "second, longer text " * 9), ("held out é",))
    arguments = parse_pretrain_arguments(["--max_length=16", "--output_dir", str(tmp_path / "run")])
    packed = pack(texts, tokenizer, arguments)
    scored = [label for row in packed.train for label in row["labels"][1:] if label != -100]
    ending = tokenizer.eos_token_id
    assert scored == [id for text in texts.train for id in [*tokenizer(text)["input_ids"], ending]]
    count = len(tokenizer(texts.held_out[0])["input_ids"]) + 1
    assert packed.bytes_per_token == pytest.approx(11 / count)  # é is two bytes
    losses = RowLosses(np.array([count * np.log(2)]), np.array([count]))
    assert pretrain.bits_per_byte(losses, packed.bytes_per_token) == pytest.approx(count / 11)


def test_conversations_need_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 20)
    arguments = parse_pretrain_arguments([f"--dataset_name={tmp_path / 'rows.jsonl'}"])
    with pytest.raises(UserError, match="--tokenizer_name_or_path"):
        pretrain.read_texts(arguments)


def test_another_run_in_the_folder_is_refused(flags: list[str], tmp_path: Path, capfd) -> None:
    folder = tmp_path / "run"
    assert pretrain.main([*flags, "--output_dir", str(folder)]) == 0
    assert pretrain.main([*flags, "--output_dir", str(folder)]) == 2
    assert "already holds another run" in capfd.readouterr().err
    resume = ["--output_dir", str(folder), "--resume_from_checkpoint=true"]
    assert pretrain.main([*flags, *resume, "--moe_expert_gated=true"]) == 2
    assert "its config is" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("block", ["dcca", "standard"])
def test_killed_and_resumed_equals_uninterrupted(
    block: str, flags: list[str], run_script, recipes: Path, tmp_path: Path
) -> None:
    words = [*flags, f"--moe_block={block}", "--max_steps=40", "--save_steps=4", "--attention_dropout=0.1"]
    whole = run_script(*words, "--output_dir", tmp_path / "whole", script="pretrain.py")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(recipes / "pretrain.py"), *words, "--output_dir", str(killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not list(killed.glob("checkpoint-8/trainer_state.json")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    assert not (killed / "model.safetensors").exists()
    again = run_script(*words, "--output_dir", killed, "--resume_from_checkpoint", "true", script="pretrain.py")
    assert again.returncode == 0, again.stderr
    assert len(losses(killed)) == 40
    assert losses(killed) == losses(tmp_path / "whole")
    assert_same_model(killed, tmp_path / "whole", tolerance=0)
    found = [json.loads((folder / "metrics.json").read_text())["loss"] for folder in (killed, tmp_path / "whole")]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [["--ep_size=2"], ["--ep_size=2", "--ep_implementation=all_to_all"], ["--fsdp_size=2"]]
)
def test_a_model_spread_over_two_processes_equals_one(
    layout: list[str], flags: list[str], run_script, tmp_path: Path
) -> None:
    # The auxiliary loss is of one process' rows: summed over two it is another number.
    words = [*flags, "--save_strategy=no", "--output_router_logits=false", "--ngram_baseline=false"]
    one = run_script(*words, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps=2", script="pretrain.py")
    assert one.returncode == 0, one.stderr
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    two = run_script(*words, *layout, "--output_dir", tmp_path / "two", launcher=launcher, script="pretrain.py")
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert [entry["processes"] for entry in metrics] == [1, 2]
    assert metrics[0]["tokens_per_step"] == metrics[1]["tokens_per_step"]
    for name in ("before", "after"):
        assert metrics[1]["loss"][name] == pytest.approx(metrics[0]["loss"][name], abs=1e-5)
    assert_same_model(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    assert not list((tmp_path / "two").glob(".building-*"))
