"""Every card in `model_cards/` is what its writer makes of its JSON, byte for byte."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the writers of cards draw with matplotlib")

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
# Card: module under recipes/ or recipes/benchmarks/, and its function of the JSON.
WRITERS = {
    "dcca-pretrain": ("dcca_card", "render_pretrain"),
    "dcca-speed": ("dcca_card", "render_speed"),
    "ders-upcycle": ("ders_card", "render_card"),
    "mup-coord": ("mup_coord_card", "render_card"),
    "mup-transfer": ("mup_transfer_card", "render"),
    "perft-inference": ("perft_inference_card", "render_card"),
    "perft-quickstart": ("perft_quickstart_card", "render_card"),
    "perft-router": ("perft_router_card", "render_card"),
    "perft-speed": ("perft_card", "render_card"),
    "routing-audit": ("audit_card", "render_card"),
    "sparsity-grid": ("sparsity_grid_card", "render"),
    "to-dcca": ("to_dcca_card", "render_card"),
}


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch):
    """A card's text from its JSON."""
    for folder in (ROOT / "recipes", ROOT / "recipes" / "benchmarks"):
        monkeypatch.syspath_prepend(folder)

    def text(name: str) -> str:
        module, function = WRITERS[name]
        results = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
        return getattr(importlib.import_module(module), function)(results)

    return text


def test_every_card_has_its_numbers_and_its_writer() -> None:
    assert {path.stem for path in CARDS.glob("*.md")} == set(WRITERS) == {path.stem for path in CARDS.glob("*.json")}


@pytest.mark.parametrize("name", WRITERS)
def test_the_card_is_rendered_from_its_numbers(render, name: str) -> None:
    assert render(name).encode() == (CARDS / f"{name}.md").read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_every_picture_of_a_card_is_there(name: str) -> None:
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    named = [part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")]
    assert [path for path in named if not (CARDS / path).is_file()] == []
    assert {path.stem for path in CARDS.glob(f"{name}*.png")} <= {Path(path).stem for path in named}
