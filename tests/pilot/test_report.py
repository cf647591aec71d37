"""The report: everything in one page, nothing fetched, and it can be looked at."""

import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ext.pilot.report import format_answer, render_html, render_markdown, tabulate, write_reports


class Reader(HTMLParser):
    """What a page asks for, and the words in it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_complete_and_asks_for_nothing(planted_pilot: dict[str, Any]) -> None:
    page = render_html(planted_pilot)
    reader = Reader()
    reader.feed(page)
    assert len(reader.asked) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in reader.asked)
    assert not re.search(r"url\(|@import", page)
    text = " ".join(" ".join(reader.words).split())
    for words in (
        "Recommended: perft-r", "lowers the held-out loss of the frozen base by", "Doubts", "48 held-out rows are few",
        "accelerate launch recipes/finetune.py", "--variant R", "one H100-SXM", "USD", "Is it significant?", "perft-s:r=1",
    ):  # fmt: skip
        assert words in text, words
    assert render_html(planted_pilot) == page


def test_markdown_has_the_same_numbers(planted_pilot: dict[str, Any]) -> None:
    text = render_markdown(planted_pilot)
    first, _ = tabulate(planted_pilot)
    for row in first:
        assert f"| {' | '.join(row)} |" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "<" not in text


def test_names_from_outside_are_escaped(planted_pilot: dict[str, Any]) -> None:
    told = copy.deepcopy(planted_pilot)
    told["settings"]["data"] = "<script>alert(1)</script>"
    assert "<script>" not in render_html(told)


def test_a_pilot_without_an_answer_and_with_failures_has_a_page_too(
    planted_pilot: dict[str, Any], tmp_path: Path
) -> None:
    told = copy.deepcopy(planted_pilot)
    told["recommendation"] |= {
        "answer": "no difference shown",
        "candidate": None,
        "full_job": None,
        "reason": "None is better",
    }
    failed = dict.fromkeys(told["arms"][1]) | {
        "candidate": "full", "label": "all weights", "status": "failed", "reason": "the loss became nan", "finalist": False,
        "parameters": {"model": 1, "trainable": 1, "stored": 1, "active": None}, "tried": [],
    }  # fmt: skip
    told["arms"].append(failed)
    pages = write_reports(told, tmp_path)
    assert [page.name for page in pages] == ["report.html", "report.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "No difference shown" in text
        assert "failed" in text
        assert "None is recommended" in text
    assert "No difference shown" in format_answer(told)


def test_page_in_a_browser(planted_pilot: dict[str, Any], tmp_path: Path) -> None:
    """Headless Chromium paints it without network."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    write_reports(planted_pilot, tmp_path)
    picture = tmp_path / "report.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--screenshot={picture}",
        "--window-size=1100,3200",
    ]
    done = subprocess.run(
        [*command, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=180, check=False
    )
    assert picture.exists(), done.stderr
    assert picture.stat().st_size > 50_000
