"""Cards from folders and metrics: valid front matter, a source for every number, nothing invented."""

import copy
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_moe_ext.audit.reading import RouterReading, RoutingReading
from hf_moe_ext.cards import (
    CardError,
    check_card,
    check_front_matter,
    format_results,
    name_repository,
    render_card,
    write_card,
)
from hf_moe_ext.cards.facts import Fact, refuse_bare_number, without_machine_paths
from support.hub_card_rules import check_front_matter as check_as_the_hub

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = [
    "How to load", "Base model", "Method", "Data", "Results", "Routing health", "Memory and speed", "Limits",
    "How to reproduce", "Citation",
]  # fmt: skip
METRICS: dict[str, Any] = {
    "command": "recipes/finetune.py --output_dir /home/me/outputs/run --seed 3",
    "settings": {"seed": 3, "dataset_name": "our-team/rows", "model_name_or_path": "org/base"},
    "loss": {"before": 3.0, "after": 2.5, "difference": -0.5, "low": -0.6, "high": -0.4, "rows": 70},
    "text_metric": {"name": "word_f1", "rows": 11, "before": 1.0, "after": 2.25, "name_words": 3.5, "shuffled": 0.75},
    "accuracy": {"boolq": {"before": 0.5, "after": 0.625, "majority_class": 0.55, "rows": 16}},
    "data": {
        "duplicate_rate": 0.015,
        "verbatim_tokens": 16,
        "verbatim_rate_train": 0.25,
        "verbatim_rate_held_out": 0.125,
    },
    "router_load": {"layers.0": [0.5, 0.5], "layers.1": [1.0, 0.0]},
    "train_rows": 1234,
    "steps": 40,
    "parameters": {"trainable": 5678, "active": None},
    "peak_memory_bytes": 987654321,
    "seconds": {"train": 12.5},
    "results": [{"name": "MMLU", "values": [0.25, 0.75], "seeds": [0, 1], "source": "mmlu.json", "metric": "acc"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder with metrics."""
    config = {"peft_type": "PERFT", "variant": "R", "r": 8, "base_model_name_or_path": "org/base", "revision": "abc"}
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    (path / "metrics.json").write_text(json.dumps(METRICS))
    return path


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_measured_number_is_in_its_section_with_its_source(folder: Path) -> None:
    card = render_card(folder, folder / "metrics.json")
    sections = _sections(card)
    assert list(sections) == SECTIONS
    results = sections["Results"]
    spread = "[-0.6000, -0.4000] (95% of the change, paired bootstrap over rows)"
    assert f"| held-out loss, nats per token | 3.0000 | 2.5000 | -0.5000 | {spread} | 70 | seed 3 | loss |" in results
    assert "| word_f1, 0 to 100; baselines: words of the name 3.50, shuffled pairs 0.75 | 1.00 | 2.25 |" in results
    assert "| accuracy, boolq; majority class 55.0% | 50.0% | 62.5% | - | - | 16 | seed 3 | accuracy.boolq |" in results
    assert (
        "| MMLU | - | 0.5 | - | [0.25, 0.75] (least and greatest over seeds) | - | seeds 0, 1 | mmlu.json |" in results
    )
    for said in (
        "1,234 (`metrics.json`: train_rows)",
        "1.50%",
        "25.0%",
        "12.5%",
        "that hold 16 tokens in a row of the training text: 25.0%",
    ):
        assert said in sections["Data"]
    assert "| layers.0 | adapter's | 2 | 50.0% | 50.0% | 1.000 | 0 |" in sections["Routing health"]
    assert "| layers.1 | adapter's | 2 | 100.0% | 0.0% | 0.000 | 1 |" in sections["Routing health"]
    assert "peak memory of a process, bytes: 987,654,321" in sections["Memory and speed"]
    assert "`org/base` (of the Hub), revision `abc`" in sections["Base model"]
    assert "--output_dir run --seed 3" in sections["How to reproduce"]
    assert "/home/me" not in card
    assert "arXiv 2411.08212" in sections["Citation"]


def test_a_reading_of_the_audit_is_shown_router_by_router(folder: Path) -> None:
    counts = {"base": [30, 10, 0, 0], "default": [8, 8], "unseen": [0, 0]}
    routers = tuple(
        RouterReading("layers.0", name, len(seen), 1, sum(seen), np.array(seen)) for name, seen in counts.items()
    )
    metrics = METRICS | {"routing": RoutingReading(routers).as_dict()}
    shown = _sections(render_card(folder, metrics, source="metrics.json"))["Routing health"]
    assert f"| layers.0 | base | 4 | 75.0% | 0.0% | {routers[0].load_entropy:.3f} | 2 |" in shown
    assert "| layers.0 | default | 2 | 50.0% | 50.0% | 1.000 | 0 |" in shown
    assert "unseen" not in shown
    assert "layers.1" not in shown  # the older form is of the same routers


def test_the_front_matter_is_one_the_hub_takes(folder: Path) -> None:
    text = render_card(folder, folder / "metrics.json", license="apache-2.0")
    assert check_as_the_hub(text) == ([], [])
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.license) == ("peft", "org/base", "apache-2.0")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.datasets == ["our-team/rows"]
    assert {"hf_moe_ext", "perft"} <= set(data.tags)
    assert {(found.metric_type, found.metric_value) for found in data.eval_results} == {
        ("loss", 2.5), ("word_f1", 2.25), ("accuracy", 0.625), ("acc", 0.5),
    }  # fmt: skip


def test_what_is_not_measured_is_said_so_and_no_number_appears(folder: Path) -> None:
    card = render_card(folder)
    sections = _sections(card)
    assert list(sections) == SECTIONS
    for name in ("Results", "Routing health", "Memory and speed"):
        assert sections[name].strip() == "Not measured."
    assert not re.search(r"\d", sections["Data"])
    assert "not recorded" in sections["How to reproduce"]
    assert "model-index" not in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"results": [{"name": "MMLU", "value": 0.4}]}, r"results\[0\] \('MMLU'\) has no source"),
        ({"results": [{"value": 0.4, "source": "a.json"}]}, r"results\[0\] .* has no name"),
        ({"results": [{"name": "MMLU", "source": "a.json"}]}, "neither value nor values"),
        ({"results": [{"name": "MMLU", "value": "high", "source": "a.json"}]}, "must be a number; it is 'high'"),
        ({"loss": {"before": 3.0, "after": float("nan"), "rows": 7}}, r"`metrics.json`: loss.after is nan"),
        ({"seconds": {"train": float("inf")}}, "seconds.train is inf"),
    ],
)
def test_a_number_that_cannot_stand_is_refused_by_name(folder: Path, change: dict, words: str) -> None:
    (folder / "metrics.json").write_text(json.dumps(METRICS | change))
    with pytest.raises(CardError, match=words):
        write_card(folder, folder / "metrics.json")
    assert not (folder / "README.md").exists()


def test_numbers_given_without_their_file_are_refused(folder: Path) -> None:
    with pytest.raises(CardError, match=r"loss\.before = 3\.0 has no source"):
        render_card(folder, METRICS)
    with pytest.raises(CardError, match=r"0\.5 has no source"):
        refuse_bare_number(0.5)
    with pytest.raises(CardError, match="has no source"):
        Fact(0.5, "")
    assert render_card(folder, METRICS, source="metrics.json") == render_card(folder, folder / "metrics.json")
    assert "loss, nats per token" in format_results(METRICS, "metrics.json")


def test_a_template_cannot_print_a_bare_number(folder: Path) -> None:
    metrics = copy.deepcopy(METRICS)
    metrics["pictures"] = [0.5]  # stands for a number that reaches a template past the readers
    with pytest.raises(CardError, match=r"0\.5 has no source"):
        render_card(folder, metrics, source="metrics.json")


def test_rendered_twice_it_is_the_same_and_own_words_and_data_stay(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: fr\nlicense: mit\ntags:\n- mine\n---\nWritten by me.\n")
    write_card(folder, folder / "metrics.json")
    once = (folder / "README.md").read_text()
    assert check_card(folder, folder / "metrics.json")
    (folder / "README.md").write_text(
        once.replace("<!-- hf_moe_ext: card -->", "First words.\n\n<!-- hf_moe_ext: card -->")
    )
    write_card(folder)
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert text.index("First words.") < text.index("## How to load") < text.index("Written by me.")
    assert (data.language, data.license) == ("fr", "mit")
    assert "mine" in data.tags
    assert "2.5000" not in text  # results go with their weights
    assert not check_card(folder, folder / "metrics.json")


def test_a_base_of_one_machine_is_named_but_not_filed(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "my-base")})
    )
    text = render_card(folder)
    assert str(tmp_path) not in text
    assert "`my-base`" in text
    assert "base_model" not in text.split("---")[1]


def test_a_whole_model_and_a_folder_of_measurements(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(
        json.dumps({"arms": {"a": {"loss": {"before": 2.0, "after": 1.0}, "parameters": 7}}})
    )
    alone = render_card(tmp_path, tmp_path / "metrics.json")
    assert "holds no model" in alone
    assert "| held-out loss, nats per token, a | 2.0000 | 1.0000 |" in alone
    with pytest.raises(CardError, match="holds neither adapter_config"):
        render_card(tmp_path)
    config = {"model_type": "olmoe_ext", "moe_block": "dcca", "architectures": ["OlmoeExtForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = render_card(tmp_path)
    assert "A `olmoe_ext` language model, with the MoE block `dcca`" in text
    assert ModelCard(text).data.library_name == "transformers"
    assert text.index("import hf_moe_ext") < text.index("AutoModelForCausalLM.from_pretrained")


def test_a_repository_is_named_in_our_part_only(folder: Path) -> None:
    write_card(folder)
    own = 'My example: from_pretrained("my/other")'
    text = (folder / "README.md").read_text() + f"\n{own}\n"
    named = name_repository(text, "our-team/adapter", "try")
    assert 'AutoPeftModelForCausalLM.from_pretrained("our-team/adapter", revision="try")' in named
    assert "\n# adapter\n" in named
    assert own in named


def test_a_card_that_cannot_be_read_is_refused(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CardError, match="cannot be read"):
        write_card(folder)
    (folder / "README.md").write_text("---\nbase_model:\n- org/base\n- /my/base\n---\n")
    with pytest.raises(CardError, match="'/my/base', which is no id of the Hub"):
        check_front_matter(folder)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("run /tmp/a/b --x=/srv/data/c.json ~/d/e", "run b --x=c.json e"),
        (
            "see https://arxiv.org/abs/1 or org/name and/or ./here/x",
            "see https://arxiv.org/abs/1 or org/name and/or ./here/x",
        ),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_paths_of_one_machine_are_cut(given, shown) -> None:
    assert without_machine_paths(given) == shown


def test_the_wheel_carries_the_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        packed = {name.rpartition("/")[2] for name in wheel.namelist() if "/card_templates/" in name}
    assert packed == {path.name for path in (ROOT / "hf_moe_ext" / "card_templates").iterdir()}
