"""The command line and the YAML files."""

from pathlib import Path

import pytest

from finetune_arguments import UserError, find_idle_settings, parse_arguments
from finetune_model import build_adapter_config

# pretrain_*.yaml and upcycle.yaml are other recipes'.
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs").glob("[!pu]*.yaml"))
EXPECTED = {
    "quickstart_r", "quickstart_e", "quickstart_d", "quickstart_s", "quickstart_lora_qv", "reasoning_local",
    "olmoe_commonsense", "mixtral_commonsense",
}  # fmt: skip


def test_every_named_recipe_is_shipped() -> None:
    assert {path.stem for path in CONFIGS} >= EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_yaml_parses_and_makes_an_adapter(path: Path) -> None:
    extra = ["--data_dir", "somewhere"] if path.stem == "reasoning_local" else []
    arguments = parse_arguments(["--config", str(path), *extra])
    assert not arguments.training.bf16, "sharding would give the adapters' router bfloat16"
    assert find_idle_settings(arguments) == []
    assert build_adapter_config(arguments.adapter) is not None
    if path.stem.startswith("quickstart_") and path.stem != "quickstart_lora_qv":
        assert arguments.adapter.variant == path.stem[-1].upper()


def test_quickstart_variants_differ_in_nothing_but_the_adapter() -> None:
    described = []
    for path in CONFIGS:
        if path.stem.startswith("quickstart_"):
            settings = parse_arguments(["--config", str(path)]).describe()
            described.append({k: v for k, v in settings.items() if k not in ("peft", "variant", "lora_target_modules")})
    assert all(settings == described[0] for settings in described)


def test_no_arguments_is_the_quickstart() -> None:
    arguments = parse_arguments([])
    assert (arguments.model.model_name_or_path, arguments.data.dataset_name) == ("quickstart", "docstrings")
    assert (arguments.adapter.peft, arguments.adapter.variant) == ("perft", "R")
    assert arguments.output_dir == Path("outputs/quickstart")


def test_another_model_does_not_inherit_the_quickstart(olmoe_dir: Path) -> None:
    arguments = parse_arguments(["--model_name_or_path", str(olmoe_dir)])
    assert arguments.training.max_steps == -1
    assert arguments.training.learning_rate == pytest.approx(5e-5)


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(
        "r: 4\nvariant: D\nnum_experts: 2\nlora_target_modules: [a, b]\nlearning_rate: 1e-3\ntop_k: null\n"
    )
    arguments = parse_arguments([f"--config={config}", "--r", "8", "--lora_target_modules", "c", "d"])
    assert (arguments.adapter.r, arguments.adapter.variant, arguments.adapter.num_experts) == (8, "D", 2)
    assert arguments.adapter.lora_target_modules == ["c", "d"]
    assert arguments.training.learning_rate == pytest.approx(1e-3)
    assert parse_arguments(["--config", str(config), "--lora_r", "2"]).adapter.r == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1", ["lerning_rate", "learning_rate", "a.yaml"]),
        ("config: b.yaml", ["config"]),
        ("- a\n- b", ["argument: value"]),
        ("a: [", ["not YAML"]),
        ("variant: X", ["--variant", "'X'", "R"]),
        ("r: many", ["--r", "many"]),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        parse_arguments(["--config", str(tmp_path / "a.yaml")])
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variannt", "R"], ["--variannt", "--variant"]),
        (["--config"], ["--config", "YAML"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml", "cannot be read"]),
        (["--max_length", "0"], ["--max_length", "at least 1", "0"]),
        (["--peft", "none", "--push_to_hub", "true"], ["--push_to_hub", "--peft"]),
        (["--dataset_name", "reasoning"], ["--data_dir", "boolq_train.jsonl.gz"]),
        (["--eval_strategy", "sometimes"], ["sometimes"]),
    ],
)
def test_bad_flags_are_refused(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_arguments(flags)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top_k", "5", "--num_experts", "4"], ["top_k", "5"]),
        (["--variant", "S", "--num_experts", "4"], ["num_experts", "S"]),
        (["--top_k", "1", "--normalize_top_k", "true"], ["normalize_top_k"]),
    ],
)
def test_contradicting_adapter_settings_are_user_errors(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        build_adapter_config(parse_arguments(flags).adapter)
    assert all(word in str(raised.value) for word in ["--peft perft", *words]), raised.value


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--peft", "lora", "--variant", "E"], "--variant"),
        (["--peft", "full", "--r", "4"], "--r "),
        (["--variant", "S", "--router_learning_rate", "1"], "--router_learning_rate"),
        (["--model_name_or_path", "x", "--base_max_steps", "5"], "--base_max_steps"),
        (["--data_dir", "x"], "--data_dir"),
    ],
)
def test_settings_without_effect_are_named(flags: list[str], word: str) -> None:
    assert any(word in sentence for sentence in find_idle_settings(parse_arguments(flags)))
