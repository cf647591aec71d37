"""What the conversion of a trained model to the DCCA form costs, over widths, methods and seeds.

    python recipes/benchmarks/to_dcca.py [--part fit|distill ...] [--work_dir outputs/to_dcca] [--card_dir model_cards]

The source is the quickstart's base (built when it is not there), the text the Python standard library: fitted on its
train modules, measured on the held-out ones, which neither the base nor the fit has seen. "data" is what `hf-moe to-dcca`
does; "independent" fits each layer by itself; "svd" looks at the weights alone. Finished cells are kept in the work
folder, so an interrupted study goes on where it was.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES))
sys.path.insert(0, str(RECIPES / "benchmarks"))

from to_dcca_card import render_card  # noqa: E402

from quickstart.corpus import Module, read_corpus  # noqa: E402  # after the path is set
from quickstart.pretrain import BaseSettings, build_base, find_base  # noqa: E402

RATIOS = (0.125, 0.25, 0.5, 0.75, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "data": {},
    "independent": {"sequential": False},
    "svd": {"method": "svd"},  # no data, so no seeds
}


@dataclass(frozen=True)
class Cell:
    """One conversion."""

    ratio: float
    method: str
    seed: int
    distill_steps: int = 0

    @property
    def name(self) -> str:
        """Of its file in the work folder."""
        return f"{self.ratio}-{self.method}-{self.seed}-{self.distill_steps}"


def main() -> None:
    """Run what is missing of the wanted parts; write the JSON and the card of all that is there."""
    options = parse_options()
    cells = plan_cells(options)
    base, texts = prepare(options)
    for cell in cells:
        path = options.work_dir / f"{cell.name}.json"
        if not path.is_file() and ("distill" if cell.distill_steps else "fit") in options.part:
            run_cell(cell, base, texts, options, path)
            print(f"{cell.name} done", flush=True)
    found = {cell: options.work_dir / f"{cell.name}.json" for cell in cells}
    results = {
        "command": shlex.join(["python", "recipes/benchmarks/to_dcca.py", *sys.argv[1:]]),
        **{name: getattr(options, name) for name in ("num_tokens", "distill_tokens", "distill_steps", "seeds")},
        "learning_rate": options.learning_rate,
        "runs": [
            summarize(cell, json.loads(path.read_text("utf-8"))) for cell, path in found.items() if path.is_file()
        ],
    }
    options.card_dir.mkdir(parents=True, exist_ok=True)
    (options.card_dir / "to-dcca.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.card_dir / "to-dcca.md").write_text(render_card(results), encoding="utf-8")
    print((options.card_dir / "to-dcca.md").read_text(encoding="utf-8"))


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("fit", "distill"), default=["fit", "distill"])
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/to_dcca"))
    parser.add_argument("--base_cache_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--source", type=Path, help="Another trained model than the quickstart's base.")
    parser.add_argument("--source_dir", type=Path, help="Folder of .py files in place of the library.")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--distill_ratios", type=float, nargs="+", default=[0.125, 0.25])
    parser.add_argument("--num_tokens", type=int, default=32_768, help="Calibration tokens of a fit.")
    parser.add_argument("--distill_tokens", type=int, default=524_288, help="Calibration tokens with distillation.")
    parser.add_argument("--held_out_tokens", type=int, default=32_768)
    parser.add_argument("--distill_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(words)


def plan_cells(options: argparse.Namespace) -> list[Cell]:
    """Every conversion of the study; "svd" once per width, since it draws nothing."""
    fits = [
        Cell(ratio, method, seed)
        for ratio in options.ratios
        for method in METHODS
        for seed in (options.seeds[:1] if method == "svd" else options.seeds)
        if not (method == "independent" and ratio > 0.5)  # the methods meet as the width grows
    ]
    return fits + [
        Cell(r, "data", seed, options.distill_steps) for r in options.distill_ratios for seed in options.seeds
    ]


def prepare(options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The source model's folder and one folder of texts per side of the corpus."""
    corpus = read_corpus(options.source_dir)
    settings = BaseSettings(source_dir=options.source_dir and str(options.source_dir))
    base = options.source or find_base(settings, options.base_cache_dir, corpus)
    if not base.is_dir():
        build_base(settings, base)
    texts = {"train": options.work_dir / "train", "held_out": options.work_dir / "held_out"}
    for side, folder in texts.items():
        _write_texts(getattr(corpus, side), folder)
    return base, texts


def _write_texts(modules: tuple[Module, ...], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for module in modules:
        (folder / module.name.replace("/", "__")).write_text(module.text, encoding="utf-8")


def run_cell(cell: Cell, base: Path, texts: dict[str, Path], options: argparse.Namespace, path: Path) -> None:
    """One conversion; its report goes to the work folder."""
    from hf_moe_ext.convert import DistillationSettings, to_dcca

    report = to_dcca(
        base,
        options.work_dir / f"{cell.name}-model",
        texts["train"],
        held_out=texts["held_out"],
        ratio=cell.ratio,
        num_tokens=options.distill_tokens if cell.distill_steps else options.num_tokens,
        num_held_out_tokens=options.held_out_tokens,
        sequence_length=options.sequence_length,
        distillation=DistillationSettings(num_steps=cell.distill_steps, learning_rate=options.learning_rate),
        seed=cell.seed,
        overwrite=True,
        **METHODS[cell.method],
    )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report.as_dict()), encoding="utf-8")
    partial.rename(path)


def summarize(cell: Cell, report: dict[str, Any]) -> dict[str, Any]:
    """What the card needs of one conversion."""
    keys = ("perplexity_source", "perplexity_converted", "perplexity_distilled", "recovered_fraction", "seconds")
    last = report["layers"][-1]
    return {
        "ratio": cell.ratio,
        "latent_size": report["settings"]["latent_size"],
        "method": cell.method,
        "seed": cell.seed,
        "distill_steps": cell.distill_steps,
        "relative_hidden_error": last["relative_hidden_error"],
        **{key: report[key] for key in keys},
        "num_parameters_source": report["num_parameters_source"],
        "num_parameters": report["num_parameters"],
    }


if __name__ == "__main__":
    main()
