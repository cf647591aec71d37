"""How a recipe starts: on as many CPU processes as were asked for, and with one exit code for the user's mistakes."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from cpu_processes import find_missing_processes, start_processes
from distribution import check_distribution
from finetune_arguments import UserError
from output_folder import check_hub_login, check_output_folder


def run_recipe(
    script: str,
    parse: Callable[[Sequence[str] | None], Any],
    run: Callable[[Any, str], Any],
    argv: Sequence[str] | None,
) -> int:
    """Parse and run; the exit code is 2 for a mistake of the user's, of which nothing is written.

    Args:
        script: `__file__` of the recipe, which processes that are missing are started with.
        parse: Words to checked arguments.
        run: Called with the arguments and the command line.
        argv: Words of the command line; None for the script's own.
    """
    name, words = Path(script).name, sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(argv)
        if argv is None and (missing := find_missing_processes()):
            check_output_folder(arguments)  # here the exit code is still ours to choose
            check_distribution(arguments.model, arguments.training, missing)
            return start_processes(missing, script, words)
        run(arguments, shlex.join([f"recipes/{name}", *_without_token(words)]))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _without_token(words: Sequence[str]) -> list[str]:
    """The words of a command line that is written into cards and metrics."""
    kept, hidden = [], False
    for word in words:
        name, joined, _ = word.partition("=")
        secret = name.replace("-", "_") in ("__hub_token", "__push_to_hub_token")
        kept.append("HF_TOKEN" if hidden else f"{name}=HF_TOKEN" if secret and joined else word)
        hidden = secret and not joined
    return kept


def refuse_common_mistakes(arguments: Any) -> None:
    """Refuse what can be refused of every recipe before anything takes time or is written."""
    logging.set_verbosity_warning()
    if not torch.accelerator.is_available():
        arguments.training.dataloader_pin_memory = False  # nothing to pin for; torch would warn at every loader
    check_distribution(arguments.model, arguments.training, arguments.training.world_size)
    check_output_folder(arguments)
    check_hub_login(arguments)
