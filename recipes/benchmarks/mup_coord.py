"""The coordinate check of µP on a small Mixtral, in all parametrisations and blocks.

    python recipes/benchmarks/mup_coord.py [--blocks standard dcca held] [--work_dir outputs/mup_coord] [--card_dir model_cards]

Every arm is `check_coordinates` on the same model at widths 64 to 512 and one batch of Python source. Finished arms are kept
in the work folder, so an interrupted run goes on where it was, and several may run at once on different blocks.
"""

import argparse
import inspect
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES / "benchmarks"))

import torch  # noqa: E402  # after the path is set
import transformers  # noqa: E402
from mup_coord_card import draw, render_card  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_moe_ext import MixtralExtConfig  # noqa: E402
from hf_moe_ext.mup import check_coordinates  # noqa: E402

BASE_WIDTH, BASE_STD, EMBEDDING_STD, SMALL_STD = 32, 0.1, 0.5, 0.02
WIDTHS, LEARNING_RATE, NUM_STEPS = (64, 128, 256, 512), 4e-3, 6
SEEDS, MORE_SEEDS = (0, 1), (0, 1, 2, 3, 4, 5)  # two seeds leave +-0.1 on a slope: more for what is to pass
_BATCH_OFFSET, _ROWS, _LENGTH = 5000, 8, 64

# What the blocks are called -> keys of the configuration, and whether the latent keeps its size.
BLOCKS: dict[str, tuple[dict[str, Any], bool]] = {
    "standard": ({}, False),
    "dcca": ({"moe_block": "dcca"}, False),
    "held": ({"moe_block": "dcca"}, True),
}
_MUP = {"mup_base_hidden_size": BASE_WIDTH}
# Keys of the configuration, and a factor on the router's first weights as a function of the width ratio m. In the folded
# form a router has the standard deviation σ/m and the rate η/m: times sqrt(m) it is a hidden weight, σ/sqrt(m) and η/m.
ARMS: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "sp": ({"mup": "none"}, lambda m: 1.0),
    "simplep": ({"mup": "simplep", **_MUP}, lambda m: 1.0),
    "mup": ({"mup": "mup", **_MUP}, lambda m: 1.0),
    "mup folded": ({"mup": "mup", "mup_form": "folded", **_MUP}, lambda m: 1.0),
    "hidden-type router": ({"mup": "mup", "mup_form": "folded", **_MUP}, lambda m: m**0.5),
    "no multiplier": ({"mup": "simplep", **_MUP}, lambda m: 1 / m),
}
# Standard deviation of router and head at the base width.
STARTS = {"all 0.1": BASE_STD, "outputs 0.02": SMALL_STD}


@dataclass(frozen=True)
class Cell:
    """One coordinate check."""

    start: str
    block: str
    arm: str

    @property
    def name(self) -> str:
        """Of its file in the work folder."""
        return "-".join((self.start, self.block, self.arm)).replace(" ", "_")


def main() -> None:
    """Run what is missing of the wanted blocks; write the JSON, the card and the figure of all that is there."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    cells = plan_cells()
    for cell in cells:
        path = options.work_dir / f"{cell.name}.json"
        if not path.is_file() and cell.block in options.blocks and cell.start in options.starts:
            run_cell(cell, path)
            print(f"{cell.name} done", flush=True)
    found = {cell: options.work_dir / f"{cell.name}.json" for cell in cells}
    results = {
        # Several calls may have filled the work folder: the one that makes it all.
        "command": "python recipes/benchmarks/mup_coord.py",
        "missing": [cell.name for cell, path in found.items() if not path.is_file()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runs": [_shorten(json.loads(path.read_text("utf-8"))) for path in found.values() if path.is_file()],
    }
    options.card_dir.mkdir(parents=True, exist_ok=True)
    (options.card_dir / "mup-coord.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (options.card_dir / "mup-coord.md").write_text(render_card(results), encoding="utf-8")
    draw(results, options.card_dir / "mup-coord.png")


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="*", choices=tuple(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--starts", nargs="+", choices=tuple(STARTS), default=list(STARTS))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mup_coord"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(words)


def plan_cells() -> list[Cell]:
    """Every arm of both starts; of the held latent, whose experts grow with the square of the width, only one start."""
    cells = [Cell(start, block, arm) for block in ("standard", "dcca") for start in STARTS for arm in ARMS]
    return cells + [Cell("all 0.1", "held", arm) for arm in ARMS if arm != "no multiplier"]


def make_config(**keys: Any) -> Any:
    """The model at its base width: two layers, eight experts of which two are active, heads of 16."""
    return MixtralExtConfig(
        hidden_size=BASE_WIDTH,
        intermediate_size=2 * BASE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=BASE_WIDTH // 16,
        num_key_value_heads=BASE_WIDTH // 16,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=256,
        max_position_embeddings=_LENGTH,
        initializer_range=BASE_STD,
        **keys,
    )


def make_model_init(router_factor: Callable[[float], float], output_std: float) -> Callable[[Any], Any]:
    """What builds a model with a wider embedding than its configuration draws, and the arm's outputs."""

    def model_init(config: Any) -> Any:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(EMBEDDING_STD / BASE_STD)
            model.lm_head.weight.mul_(output_std / BASE_STD)
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(output_std / BASE_STD * router_factor(config.hidden_size / BASE_WIDTH))
        return model

    return model_init


def read_batch() -> torch.Tensor:
    """Bytes of Python source, [rows, length]."""
    text = inspect.getsource(argparse).encode()[_BATCH_OFFSET : _BATCH_OFFSET + _ROWS * _LENGTH]
    return torch.tensor(list(text)).reshape(_ROWS, _LENGTH)


def run_cell(cell: Cell, path: Path) -> None:
    """One coordinate check; its result goes to the work folder."""
    (block, hold_latent), (parametrisation, router_factor) = BLOCKS[cell.block], ARMS[cell.arm]
    start = time.perf_counter()
    check = check_coordinates(
        make_config(**block, **parametrisation),
        WIDTHS,
        num_steps=NUM_STEPS,
        seeds=MORE_SEEDS if cell.arm == "mup" and not hold_latent else SEEDS,
        lr=LEARNING_RATE,
        tokens=read_batch(),
        hold_latent=hold_latent,
        model_init=make_model_init(router_factor, STARTS[cell.start]),
    )
    seconds = round(time.perf_counter() - start, 1)
    result = {"start": cell.start, "block": cell.block, "arm": cell.arm, "seconds": seconds} | _round(check.as_dict())
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.rename(path)


def _shorten(run: dict[str, Any]) -> dict[str, Any]:
    """What the card keeps: judged steps, and of the weights' gradients the router's and those at t = 3."""
    rows = [row for row in run["rows"] if row["step"] in (0, 1, 3, 6)]
    wanted = [
        row
        for row in rows
        if not row["quantity"].startswith("weight_gradient") or row["step"] == 3 or "mlp.gate" in row["quantity"]
    ]
    return run | {"rows": wanted}


def _round(value: Any) -> Any:
    """Five digits: the card is read by people and kept in the repository; what has no value is null."""
    if isinstance(value, dict):
        return {key: _round(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_round(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    return value


if __name__ == "__main__":
    main()
