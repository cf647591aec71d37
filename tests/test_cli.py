"""The ``hf-moe`` command as a person and as a script meet it."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hf_moe_ext
from hf_moe_ext.cli import app
from support import zoo

COMMAND = [sys.executable, "-m", "hf_moe_ext.cli"]


@pytest.fixture
def base(tmp_path: Path) -> str:
    zoo.FAMILIES["olmoe"]().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_version_and_help_list_what_exists() -> None:
    assert _run("--version") == (0, f"hf_moe_ext {hf_moe_ext.__version__}\n", "")
    code, text, _ = _run("--help")
    assert code == 0
    assert "env" in text
    assert "doctor" in text


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from hf_moe_ext.cli import app\n"
        "for a in (['--version'], ['--help'], ['doctor', '--help']): assert CliRunner().invoke(app, a).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_env_in_a_process_of_its_own() -> None:
    result = subprocess.run([*COMMAND, "env"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"hf_moe_ext {hf_moe_ext.__version__} on ")
    assert str(Path.home()) not in result.stdout  # it is pasted in public


def test_env_as_json() -> None:
    code, text, _ = _run("env", "--json")
    report = json.loads(text)
    assert code == 0
    assert {"python", "torch", "peft", "trl"} <= {package["name"] for package in report["packages"]}
    assert report["devices"][0]["kind"] == "cpu"


def test_doctor_in_a_process_of_its_own(base: str) -> None:
    result = subprocess.run([*COMMAND, "doctor", base, "--top_k", "1"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    # PEFT imports quantisation libraries where they are installed; their notes are not ours.
    others = ("torchao", "torch/utils/_pytree", "kernels")
    assert not [line for line in result.stderr.splitlines() if not any(word in line for word in others)]
    for part in (
        "What would train",
        "perft_router [4, 32]",
        "8,448",
        "16 bytes per parameter",
        "activations not included",
    ):
        assert part in result.stdout
    assert "never True at top_k=1" in result.stdout
    assert result.stdout.rstrip().endswith("nothing")


def test_doctor_prints_findings_with_their_next_step_and_exits_1(tmp_path: Path) -> None:
    zoo.REFUSED["llama"]().save_pretrained(tmp_path)
    code, text, _ = _run("doctor", str(tmp_path))
    assert code == 1
    assert "error (no-moe-block): No MoE block found in LlamaForCausalLM" in text
    assert "next: choose a base model of a supported family" in " ".join(text.split())
    code, text, _ = _run("doctor", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(text)["findings"][0]["code"] == "no-moe-block"


def test_doctor_warnings_leave_exit_code_0(base: str) -> None:
    code, text, _ = _run("doctor", base, "--num-experts", "1")
    assert code == 0
    assert "nothing, but:" in text
    assert "warning (option-warning): PerftConfig: variant='R' with num_experts=1" in text


def test_every_option_reaches_the_configuration(base: str) -> None:
    arguments = (
        *("--variant", "R", "--adapter", "parallel", "--r", "4", "--lora-dropout", "0.1", "--num_experts", "6"),
        *("--top-k", "3", "--no-normalize-top-k", "--router-aux-loss-coef", "0.5", "--router-z-loss-coef", "0.25"),
        *(
            "--router-aux-loss-scope",
            "sequence",
            "--base-router",
            "lora",
            "--base-router-drift-coef",
            "2",
            "--shared_A",
        ),
        *("--target-modules", "experts", "--exclude-modules", "nothing", "--layers-to-transform", "1"),
        *("--layers-pattern", "layers", "--modules-to-save", "lm_head", "--bias", "all", "--task-type", "CAUSAL_LM"),
    )
    code, text, _ = _run("doctor", base, "--json", *arguments)
    report = json.loads(text)
    assert code == 0, text
    version = report["settings"].pop("hf_moe_ext_version")
    assert version == hf_moe_ext.__version__
    assert report["settings"] == {
        **{"variant": "R", "adapter": "parallel", "r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "num_experts": 6},
        **{"top_k": 3, "normalize_top_k": False, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25},
        **{"target_modules": ["experts"], "exclude_modules": ["nothing"], "layers_to_transform": [1]},
        **{"layers_pattern": "layers", "modules_to_save": ["lm_head"], "bias": "all", "task_type": "CAUSAL_LM"},
        **{"router_aux_loss_scope": "sequence", "base_router": "lora", "base_router_drift_coef": 2.0, "shared_A": True},
        "init_weights": True,
    }
    assert [row["module"] for row in report["modules"]] == ["model.layers.1.mlp.gate", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("doctor",), "Missing argument 'MODEL_OR_ADAPTER'"),
        (("doctor", "no/such/folder"), "neither a folder here nor a Hub id"),
        (("doctor", "x", "--variant", "Q"), "Invalid value for '--variant'"),
        (("doctor", "x", "--r", "wide"), "Invalid value for '--r'"),
        (("doctor", "x", "--nonsense"), "No such option: --nonsense"),
        (("coord-check", "no/such/folder"), "the configuration of 'no/such/folder' cannot be read"),
        (("transfer", "--from", "no/such/folder", "--to", "x"), "holds neither config.json"),
        (("fold", "no/such/folder", "--output", "x"), "neither a folder here nor a model"),
        (("inspect",), "Missing argument 'MODEL'"),
        (("dissect",), "No such command 'dissect'"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    code, out, error = _run(*arguments)
    assert code == 2
    assert out == ""
    assert words in error
    assert "Traceback" not in error


def _verbs(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that can be run, with the words that call it."""
    command = command or typer.main.get_command(app)
    for name, below in getattr(command, "commands", {}).items():
        yield from _verbs(below, (*words, name)) if hasattr(below, "commands") else [((*words, name), below)]


VERBS = {" ".join(words): command for words, command in _verbs()}


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_the_command_takes(verb: str) -> None:
    command, words = VERBS[verb], verb.split()
    code, text, _ = _run(*words, "--help")
    assert code == 0
    shown = next((part for part in command.help.split("\n\n") if part.startswith("Example")), "")
    examples = re.findall(rf"hf-moe {verb} [^;]+?(?=;|\. |$)", " ".join(shown.split()))
    assert examples, command.help
    for example in examples:
        assert example in " ".join(text.split())
        command.make_context(verb, shlex.split(example)[1 + len(words) :])  # refuses what the command does not take


@pytest.mark.parametrize("verb", VERBS)
def test_what_reports_has_json_and_says_its_exit_codes(verb: str) -> None:
    names = {name for parameter in VERBS[verb].params for name in parameter.opts}
    prints_nothing_else = ("run", "calibrate")  # another program's output; JSON always
    assert ("--json" in names) == (verb not in prints_nothing_else)
    assert "xit code" in VERBS[verb].help or verb == "env"


def test_the_shell_completes_verbs() -> None:
    program = "from hf_moe_ext.cli import app; app(prog_name='hf-moe')"
    asked = {"_HF_MOE_COMPLETE": "complete_bash", "COMP_WORDS": "hf-moe pu", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == ["push"], done.stderr
    assert "--install-completion" in _run("--help")[1]


def test_card_writes_checks_and_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "PERFT", "variant": "S", "task_type": "CAUSAL_LM"}')
    (folder / "metrics.json").write_text('{"loss": {"before": 3.0, "after": 2.5, "rows": 9}}')
    assert _run("card", str(folder), "--check")[0] == 1
    code, text, _ = _run("card", str(folder), "--license", "mit", "--json")
    assert code == 0
    assert json.loads(text) == {
        "card": str(folder / "README.md"),
        "metrics": str(folder / "metrics.json"),
        "as_rendered": True,
    }
    assert _run("card", str(folder), "--check")[0] == 0
    assert "| 3.0000 | 2.5000 |" in (folder / "README.md").read_text()
    assert _run("card", str(folder), "-o", str(tmp_path / "other.md"))[0] == 0
    assert (tmp_path / "other.md").read_text() == (folder / "README.md").read_text()
    (folder / "metrics.json").write_text('{"results": [{"name": "MMLU", "value": 0.4}]}')
    before = (folder / "README.md").read_text()
    code, _, error = _run("card", str(folder))
    assert code == 2
    assert "hf-moe card: results[0] ('MMLU') has no source" in error
    assert (folder / "README.md").read_text() == before
