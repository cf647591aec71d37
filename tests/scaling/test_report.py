"""The report: one file that asks for nothing, with every figure, and the sentences a payer needs; files to start from."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

import hf_moe_ext  # noqa: F401  (makes the loaders know our types)
from hf_moe_ext.scaling.hardware import find_hardware
from hf_moe_ext.scaling.money import Prices
from hf_moe_ext.scaling.plan_explain import as_csv, explain
from hf_moe_ext.scaling.plan_files import emit_config
from hf_moe_ext.scaling.plan_request import Inference, PlanRequest
from hf_moe_ext.scaling.plan_result import PlanResult
from hf_moe_ext.scaling.plan_text import format_plan, settling_experiment
from hf_moe_ext.scaling.planner import plan
from hf_moe_ext.scaling.report import CAPTIONS, render_html, render_markdown

REQUEST = PlanRequest(
    find_hardware("RTX-4090"),
    gpu_hours=200.0,
    context_length=1024,
    prices=Prices(0.3, currency="<EUR>"),
    inference=Inference(1e9, present_cost_per_million=2.0),
)
SVG = "data:image/svg+xml;base64,"


@pytest.fixture(scope="module")
def result() -> PlanResult:
    """One plan for all."""
    return plan(REQUEST)


@pytest.fixture(scope="module")
def told(result: PlanResult) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(explain(result)))


@pytest.fixture(scope="module")
def page(told: dict[str, Any]) -> str:
    """The HTML."""
    return render_html(told)


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_page_asks_nobody_for_anything(page: str) -> None:
    """Every link is the data itself; no script, no style sheet, no font; nor does a picture ask."""
    parser = _Links()
    parser.feed(page)
    assert len(parser.links) == len(CAPTIONS)
    assert all(link.startswith(SVG) for link in parser.links)
    assert not {"script", "link", "iframe", "object"} & set(parser.tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for link in parser.links:
        picture = base64.b64decode(link.removeprefix(SVG)).decode()
        drawn = ElementTree.fromstring(picture)
        references = [v for e in drawn.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert references
        assert all(one.startswith(("#", "data:")) for one in references)
        assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 10  # drawn, not an empty frame


def test_page_tells_cost_savings_doubt_and_experiment(page: str, told: dict[str, Any]) -> None:
    """The numbers of the plan are in it, and what the user wrote is escaped."""
    best = told["recommended"]
    assert f"{best['spread'][0]:.2f} to {best['spread'][1]:.2f}" in page
    assert f"{best['run']['total_cost']:,.0f} &lt;EUR&gt; to train" in page
    assert "<EUR>" not in page
    assert "What small experiment would settle it" in page
    assert "cheaper" in page
    for law in told["equal_loss_dense"]:
        assert f"By the {law} law" in page
    assert "None" not in page


def test_markdown_has_the_same_numbers(told: dict[str, Any]) -> None:
    """Tables with as many cells in every row."""
    text = render_markdown(told)
    assert told["reason"] in text
    assert f"{told['recommended']['run']['total_cost']:,.0f} <EUR> to train" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "{{" not in text
    assert "None" not in text


def test_a_plan_without_prices_or_demand_is_told_in_hours() -> None:
    """No money anywhere."""
    told = json.loads(json.dumps(explain(plan(replace(REQUEST, prices=None, inference=None)))))
    text = render_markdown(told) + render_html(told) + format_plan(told)
    assert "EUR" not in text
    assert "device hours" in text
    assert "None" not in text


def test_explained_numbers_survive_json(result: PlanResult) -> None:
    """No infinities or NaN, which JSON has not; without details no intermediate values."""
    text = json.dumps(explain(result), allow_nan=False)
    assert json.loads(text)["recommended"]["quality"] == result.recommended.quality
    short = explain(result, details=False)
    assert "intermediate" not in short["recommended"]
    assert "intermediate" in json.loads(text)["recommended"]


def test_csv_has_every_plan_and_marks_the_chosen(result: PlanResult) -> None:
    """Read back, the numbers are equal."""
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert len(rows) == len(result.plans)
    assert [float(row["quality"]) for row in rows] == [one.quality for one in result.plans]
    assert [row["name"] for row in rows if row["recommended"] == "True"] == [result.recommended.candidate.name]
    assert sum(row["pareto"] == "True" for row in rows) == len(result.pareto)


def test_experiment_spends_the_share_it_names(told: dict[str, Any]) -> None:
    """Ratios around the recommended one, dense among them; the runs' FLOPs add up."""
    asked = settling_experiment(told)
    ratio = told["recommended"]["laws"]["joint"]["counts"]["num_experts"]
    assert asked["expert_ratios"][0] == 1.0
    assert ratio in asked["expert_ratios"]
    spent = sum(asked["budgets_flops"]) * len(asked["expert_ratios"]) * asked["seeds"]
    assert spent == pytest.approx(asked["share"] * told["derived"]["expected_flops"])


@pytest.mark.parametrize("family", ["olmoe_ext", "mixtral_ext"])
@pytest.mark.parametrize("block", ["dense", "standard", "dcca", "ders"])
def test_emitted_files_build_the_planned_model(block: str, family: str, tmp_path: Path) -> None:
    """``AutoConfig`` reads the folder, the model has the planned number of parameters, the Trainer knows every argument."""
    request = replace(REQUEST, family=family, memory_bytes=10e9)
    one = next(one for one in plan(request).plans if one.candidate.block == block)
    files = emit_config(one, request, tmp_path / "model")
    assert {path.name for path in files} == {path.name for path in (tmp_path / "model").iterdir()}
    config = AutoConfig.from_pretrained(tmp_path / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == config.architectures[0]
    assert sum(p.numel() for p in model.parameters()) == one.candidate.shape.total_parameters
    arguments = json.loads((tmp_path / "model" / "training_arguments.json").read_text())
    assert arguments.keys() <= {field.name for field in fields(TrainingArguments)}
    launched = json.loads((tmp_path / "model" / "launch.json").read_text())
    tokens = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    tokens *= launched["num_processes"] * launched["max_length"] * arguments["max_steps"]
    assert tokens == one.run.num_tokens
    with pytest.raises(ValueError, match=r"already has config\.json"):
        emit_config(one, request, tmp_path / "model")


# A browser asks for updates and lists of its own accord; these flags make it ask for nothing but the page.
SILENT = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1000,4000",
)  # fmt: skip


class _Rendered(HTMLParser):
    """Text that a reader sees, and the size of every picture as the browser has decoded it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.text = 0, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data


# Writes what the browser made of the pictures into the page that --dump-dom prints.
_SIZES = (
    "<script>addEventListener('load', () => { document.body.dataset.pictures = "
    "[...document.images].map(i => i.complete ? i.naturalWidth + 'x' + i.naturalHeight : 'broken').join(' ') })</script>"
)


def test_page_in_a_browser(page: str, told: dict[str, Any], tmp_path: Path) -> None:
    """Headless Chromium, which asks for nothing, shows the recommendation and its costs, and decodes every picture."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    assert not re.search(r"""(?:src|href|srcset|url\()\s*=?\s*["']?\s*(?:https?:)?//""", page)
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{_SIZES}</body>"))
    picture = tmp_path / "report.png"

    def render(*more: str) -> str:
        command = [browser, *SILENT, f"--user-data-dir={tmp_path / 'profile'}", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    dom = render("--dump-dom", f"file://{tmp_path / 'measured.html'}")
    seen = _Rendered()
    seen.feed(dom)
    text = " ".join(seen.text.split())
    best = told["recommended"]
    for sentence in (told["reason"], best["name"], f"{best['run']['total_cost']:,.0f} <EUR> to train"):
        assert " ".join(sentence.split()) in text
    (sizes,) = re.findall(r'data-pictures="([^"]*)"', dom)
    widths = [tuple(map(int, size.split("x"))) for size in sizes.split()]
    assert len(widths) == len(CAPTIONS)
    assert all(width > 100 and height > 100 for width, height in widths)
    render(f"--screenshot={picture}", f"file://{tmp_path / 'report.html'}")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (4000, 1000)
    # Printed and drawn on, from top to bottom, and not in one colour.
    inked = (pixels[..., :3].min(axis=2) < 0.5).any(axis=1)
    assert all(part.any() for part in inked[:2000].reshape(10, 200))
    assert len({tuple(colour) for colour in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}) > 20
