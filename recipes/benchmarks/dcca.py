"""DCCA against the stock MoE block at equal expert parameters.

    python recipes/benchmarks/dcca.py --preset cpu4 --part loss [--jobs 2] [--card_dir model_cards]
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RECIPES))

from dcca_loss import measure_loss  # noqa: E402  # after the path is set
from dcca_presets import PRESETS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu4")
    parser.add_argument("--part", default="loss")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/dcca"))
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    options = parser.parse_args()
    measure_loss(PRESETS[options.preset].loss, options)


if __name__ == "__main__":
    main()
