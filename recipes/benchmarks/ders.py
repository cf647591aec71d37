"""DeRS: what a shared base with light deltas costs and gains beside full copies and one dense FFN.

    python recipes/benchmarks/ders.py --preset cpu4 [--part time memory quality compression] [--card_dir model_cards]

Each part replaces its numbers in `ders-upcycle.json` of the card folder, with the command that made them; card and figure
are rendered from that file. `quality` keeps finished runs in the work folder, so that a stopped study goes on where it
was; `compression` compresses its trained models. Wanted for `time`: a machine with nothing else to do.
"""

import argparse
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
from dcca_loss import lower_priority  # noqa: E402
from dcca_presets import describe  # noqa: E402
from ders_card import draw_compression, render_card  # noqa: E402
from ders_compression import measure_compression  # noqa: E402
from ders_memory import measure_memory  # noqa: E402
from ders_presets import PRESETS, Preset  # noqa: E402
from ders_quality import measure_quality  # noqa: E402
from ders_time import measure_time  # noqa: E402

from dcca import read_results, write_results  # noqa: E402

PARTS = ("time", "memory", "quality", "compression")


def main(words: list[str] | None = None) -> None:
    """Measure the parts asked for, merge them into the JSON, and render the card."""
    options = parse_options(words)
    preset = PRESETS[options.preset]
    lower_priority(options.nice)
    if preset.layer.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--preset {options.preset} needs a CUDA device and this machine has none. Give --preset cpu4.")
    command = shlex.join(["python", "recipes/benchmarks/ders.py", *(sys.argv[1:] if words is None else words)])
    path = options.card_dir / "ders-upcycle.json"
    for part in options.part:
        results = read_results(path)
        run = results["runs"].setdefault(options.preset, {})
        load = os.getloadavg()[0]
        run[part] = {
            "command": command,
            "sizes": describe({"time": preset.layer, "memory": preset.memory}.get(part, preset.quality)),
            "device": describe_device(preset),
            "load_average": [round(load, 1)],
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
            **measure(part, preset, run, options),
        }
        run[part]["load_average"].append(round(os.getloadavg()[0], 1))
        write_results(results, path)
    results = read_results(path)
    (options.card_dir / "ders-upcycle.md").write_text(render_card(results), encoding="utf-8")
    draw_compression(results, options.card_dir / "ders-upcycle.png")
    print((options.card_dir / "ders-upcycle.md").read_text(encoding="utf-8"))


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu4")
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS), help="None: render the card only.")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="Runs of `quality` at a time.")
    parser.add_argument("--nice", type=int, default=0, help="Lower priority; for `quality` beside other work.")
    parser.add_argument("--source_dir", help="Python files for `quality` to read, in place of the standard library.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/ders"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    return parser.parse_args(words)


def measure(part: str, preset: Preset, run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One part's numbers."""
    if part == "time":
        return measure_time(preset.layer)
    if part == "memory":
        return measure_memory(preset.memory)
    if part == "quality":
        return measure_quality(preset.quality, options)
    if "quality" not in run:
        sys.exit("--part compression compresses the models of --part quality: run that first.")
    return measure_compression(preset.quality, options, run["quality"])


def describe_device(preset: Preset) -> str:
    """What it ran on."""
    if preset.layer.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
