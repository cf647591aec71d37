"""DCCA against the stock MoE block at equal expert parameters: loss, bytes, step and link times, decoding, a probe.

    python recipes/benchmarks/dcca.py --preset cpu4 [--part loss time probe step link decode bytes] [--card_dir model_cards]

Each part replaces or joins its numbers in `dcca-pretrain.json` (loss, probe) and `dcca-speed.json` (the others) of the
card folder, with the command that made them; the cards and figures are rendered from those files. Without `--part` all
of them run. `loss` keeps finished runs in the work folder, so that a stopped study goes on where it was. `link` needs
root: it makes network namespaces and rate-limited links between them, which go when it ends, however it ends.
Wanted on a machine with nothing else to do: as many free cores as ranks for `step`, `link` and `decode`.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES))
sys.path.insert(0, str(RECIPES / "benchmarks"))

import torch  # noqa: E402  # after the path is set
import transformers  # noqa: E402
from dcca_card import draw_curves, draw_speed, render_pretrain, render_speed  # noqa: E402
from dcca_loss import compare_equal_times, lower_priority, measure_loss  # noqa: E402
from dcca_presets import PRESETS, Preset, describe  # noqa: E402
from dcca_probe import measure_probe  # noqa: E402
from dcca_step import OURS, STOCK, measure_bytes, measure_decode, measure_link, measure_step  # noqa: E402

PRETRAIN_PARTS, SPEED_PARTS = ("loss", "time", "probe"), ("step", "link", "decode", "bytes")


def main(words: list[str] | None = None) -> None:
    """Measure the parts asked for, merge them into the JSON, and render the cards."""
    options = parse_options(words)
    preset = PRESETS[options.preset]
    if options.source_dir is not None:
        preset = dataclasses.replace(preset, loss=dataclasses.replace(preset.loss, source_dir=options.source_dir))
    lower_priority(options.nice)
    if preset.step.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {options.preset} needs a CUDA device and this machine has none. Give --preset cpu4.")
    command = shlex.join(["python", "recipes/benchmarks/dcca.py", *(sys.argv[1:] if words is None else words)])
    for part in options.part:
        path = options.card_dir / f"dcca-{'pretrain' if part in PRETRAIN_PARTS else 'speed'}.json"
        results = read_results(path)
        run = results["runs"].setdefault(options.preset, {})
        load = os.getloadavg()[0]
        measured = measure(part, preset, run, options)
        run[part] = {
            "command": command,
            "sizes": describe({"probe": preset.probe, "loss": preset.loss, "time": preset.loss}.get(part, preset.step)),
            "device": describe_device(preset),
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
            **measured,
        }
        write_results(results, path)
    write_cards(options.card_dir)


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*PRETRAIN_PARTS, *SPEED_PARTS]
    parser.add_argument("--preset", choices=PRESETS, default="cpu4")
    parser.add_argument("--part", choices=parts, nargs="+", default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--implementations", nargs="+", default=[STOCK, OURS], help="ep_implementation of the arms.")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="Runs of `loss` at a time.")
    parser.add_argument("--nice", type=int, default=0, help="Lower priority; for `loss` beside other work.")
    parser.add_argument(
        "--source_dir", help="Python files for `loss` and `probe` to read, in place of the standard library."
    )
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/dcca"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    return parser.parse_args(words)


def measure(part: str, preset: Preset, run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One part's numbers."""
    if part == "loss":
        return measure_loss(preset.loss, options)
    if part == "time":
        return compare_equal_times(preset.loss, run.get("loss"))
    if part == "probe":
        return measure_probe(preset, options)
    if part == "bytes":
        return {"ranks": measure_bytes(preset.step, run.get("step", {}).get("ranks"))}
    if part == "link":
        return measure_link(preset.step, options)
    return {"ranks": {"step": measure_step, "decode": measure_decode}[part](preset.step, options)}


def read_results(path: Path) -> dict[str, Any]:
    """What was measured before."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    return found


def write_results(results: dict[str, Any], path: Path) -> None:
    """JSON, moved into place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def write_cards(folder: Path) -> None:
    """Cards and figures from the JSON files that are there."""
    for name, render, draw in (
        ("dcca-pretrain", render_pretrain, draw_curves),
        ("dcca-speed", render_speed, draw_speed),
    ):
        path = folder / f"{name}.json"
        if path.is_file():
            results = read_results(path)
            (folder / f"{name}.md").write_text(render(results), encoding="utf-8")
            draw(results, folder / f"{name}.png")
            print((folder / f"{name}.md").read_text(encoding="utf-8"))


def describe_device(preset: Preset) -> str:
    """What it ran on."""
    if preset.step.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, one thread per process"


if __name__ == "__main__":
    main()
