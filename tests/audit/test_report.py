"""The page of an inspection: whole, the worst first, asking nobody, and as a browser paints it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hf_moe_ext.audit.comparison import compare
from hf_moe_ext.audit.findings import find_all
from hf_moe_ext.audit.inspection import ModelFacts, TokenLoss
from hf_moe_ext.audit.report import format_text, group_findings, render_html
from support.inspected import inspection, router

EVEN = [500, 480, 520, 510, 490, 500, 505, 495]


def _slices(counts: list[int], seed: int) -> dict[str, np.ndarray]:
    shares = np.array(counts) / sum(counts)
    generator = np.random.default_rng(seed)
    return {name: generator.multinomial(sum(counts) // 2, shares) for name in ("code", "law & order")}


def _inspected(dead: bool = True, seed: int = 0):
    generator = np.random.default_rng(seed)
    base = [generator.multinomial(4000, generator.dirichlet([8.0] * 8)).tolist() for _ in range(6)]
    if dead:
        base[3][5] = 0
    routers = []
    for layer, counts in enumerate(base):
        routers.append(router(counts, layer=layer, slices=_slices(counts, layer), entropy=0.4 + 0.05 * layer))
        own = generator.multinomial(4000, [0.3, 0.3, 0.2, 0.2]).tolist()
        routers.append(router(own, layer=layer, kind="mine", slices=_slices(own, 9 + layer)))
    return inspection(*routers, slice_losses={"code": TokenLoss(2.5, 2000), "law & order": TokenLoss(1.5, 2000)})


@pytest.fixture(scope="module")
def old():
    return _inspected(dead=False, seed=1)


@pytest.fixture(scope="module")
def page(old) -> str:
    told = _inspected()
    return render_html(told, compare(old, told), old)


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_asks_nobody(page: str) -> None:
    tags = _Tags(page)
    assert tags.open == []
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in tags.seen if tag in ("img", "source")]
    # Load, change and slices of two kinds of router, and the lines; each for light and dark.
    assert len(sources) == 2 * 7
    assert all(str(source).startswith("data:image/svg+xml;base64,") for source in sources)
    assert len(set(sources)) == len(sources)
    assert not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert all(attrs["alt"] for tag, attrs in tags.seen if tag == "img")


def test_the_worst_comes_first(page: str) -> None:
    codes = re.findall(r'class="where">\w+: ([\w-]+),', page)
    assert codes == [worst.code for worst, _ in group_findings(find_all(_inspected()))]
    assert codes[0] == "dead-experts"
    assert page.index("dead-experts") < page.index("Who does the work")
    text = format_text(_inspected())
    assert text.index("dead-experts") == min(text.index(code) for code in codes)
    assert "next: if the text is what the model is for" in text


def test_findings_of_one_kind_stand_together() -> None:
    told = inspection(*[router([1000, 0, 1000, 2000], layer=layer) for layer in range(20)])
    groups = group_findings(find_all(told))
    assert [(worst.code, len(others)) for worst, others in groups] == [("dead-experts", 19)]
    text = format_text(told)
    assert text.count("next:") == 1
    assert "and 13 more like it" in text
    assert "19 more like it" in render_html(told)


def test_comparison_stands_in_page_and_text(page: str, old) -> None:
    told = _inspected()
    comparison = compare(old, told)
    assert comparison.exceeded
    assert comparison.exceeded[0].as_text() in page
    text = format_text(told, comparison)
    assert f"past the limit: {comparison.exceeded[0].as_text()}" in text
    assert "loss of slice code: 2.5000 then, 2.5000 now" in text
    assert "nothing is past a limit" in format_text(told, compare(told, told))
    assert "Nothing is past a limit" in render_html(told, compare(told, told), told)


def test_names_are_escaped(old) -> None:
    told = inspection(router(EVEN), model=ModelFacts("<script>alert(1)</script>", "olmoe", "c", "t", "a&b", "h"))
    page = render_html(told)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a&amp;b" in page
    assert "law &amp; order" in render_html(old)


def test_nothing_wrong_is_said_so() -> None:
    told = inspection(router(EVEN))
    assert "Nothing wrong was found in the routing." in format_text(told)
    assert "Nothing wrong was found" in render_html(told)


def test_layers_of_different_numbers_of_experts_and_unknown_probabilities() -> None:
    told = inspection(
        router(EVEN), router([2000, 1000, 1000], layer=1, entropy=None, max_probability=None, margin=None)
    )
    assert render_html(told).count("–") >= 3


def test_the_same_page_twice(page: str, old) -> None:
    told = _inspected()
    assert render_html(told, compare(old, told), old) == page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(scheme: str, page: str, tmp_path: Path) -> None:
    """Headless Chromium paints it without network; a dark page is darker than a light one."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    from matplotlib import image

    (tmp_path / "report.html").write_text(page)
    picture = tmp_path / "report.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}", "--window-size=1000,4600",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]  # fmt: skip
    done = subprocess.run([*command, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    assert picture.stat().st_size > 50_000
    brightness = image.imread(picture)[..., :3].mean()
    assert brightness < 0.35 if scheme == "dark" else brightness > 0.75
