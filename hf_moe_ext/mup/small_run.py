"""The tuned small model that a transfer starts from: a Trainer run's folder, or the results of a sweep.

``training_args.bin`` is a pickle and is not read; ``recipes/pretrain.py`` keeps the training arguments in ``metrics.json``
(``record_training_arguments``), and a YAML of them can be given beside a folder that keeps none.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from hf_moe_ext.mup.config_file import check_sizes, describe_error, read_config
from hf_moe_ext.mup.roles import NONE

# What is taken over, as TrainingArguments and recipes/pretrain.py call it.
TRAINING_KEYS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)


class TransferError(ValueError):
    """The small run cannot be read, or its learning rate says nothing about the target."""


@dataclass(frozen=True)
class SmallRun:
    """What was tuned.

    Attributes:
        source: where it was read.
        config: of the model.
        arguments: training arguments, of ``TRAINING_KEYS`` those that are known.
        num_trials: runs the tuning took; None if that is not known.
        notes: what else was particular about it, as ``Transfer.uncovered``.
    """

    source: str
    config: Any
    arguments: dict[str, Any]
    num_trials: int | None = None
    notes: tuple[str, ...] = ()


def read_small_run(source: str | os.PathLike[str], mode: str | None = None) -> SmallRun:
    """A Trainer run's folder, or the results of a sweep.

    Args:
        source: folder with ``config.json``, or folder with ``results.json``, or that file.
        mode: parametrisation of a sweep; None: "mup" if it has that, else its only one beside "none".

    Raises:
        TransferError: it is neither, or a file cannot be read.
    """
    path = Path(source)
    if path.is_file() or (path / "results.json").is_file():
        return _read_sweep(path if path.is_file() else path / "results.json", mode)
    if (path / "config.json").is_file():
        return _read_trainer_run(path)
    raise TransferError(
        f"{path} holds neither config.json (the output folder of a Trainer run) nor results.json (that of "
        "recipes/mup_transfer.py); give one of these folders"
    )


def read_target(path: str | os.PathLike[str]) -> Any:
    """The configuration of the large model.

    Raises:
        TransferError: it cannot be read.
    """
    try:
        return read_config(str(path))
    except ValueError as error:
        raise TransferError(str(error)) from error


def read_arguments(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The training arguments in a YAML or JSON file; other keys are not looked at.

    Raises:
        TransferError: it cannot be read.
    """
    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:  # ValueError: no text, or a date that is none
        raise TransferError(
            f"--arguments {path} cannot be read: {' '.join(str(error).split())}; give a YAML file"
        ) from error
    if not isinstance(keys, dict):
        raise TransferError(f"--arguments {path} must hold 'argument: value' lines; it holds {type(keys).__name__}")
    found = {name: _number(keys[name]) for name in TRAINING_KEYS if keys.get(name) is not None}
    return _drop_open_steps(found)


def record_training_arguments(args: Any, max_length: int) -> dict[str, Any]:
    """Of ``TrainingArguments`` what a transfer takes over, for a JSON file beside the model.

    Args:
        args: of the run.
        max_length: tokens per row.
    """
    known = args.to_dict()  # enumerations as their values
    return {name: known[name] for name in TRAINING_KEYS if known.get(name) is not None} | {"max_length": max_length}


def _read_trainer_run(folder: Path) -> SmallRun:
    config = read_target(folder)
    arguments: dict[str, Any] = {}
    state = _read_json(folder / "trainer_state.json") if (folder / "trainer_state.json").is_file() else {}
    if state.get("max_steps"):
        arguments["max_steps"] = state["max_steps"]
    if (folder / "metrics.json").is_file():
        metrics = _read_json(folder / "metrics.json")
        for part in ("settings", "training_arguments"):
            told = _read_part(metrics, part, folder / "metrics.json")
            arguments |= _drop_open_steps({name: told[name] for name in TRAINING_KEYS if told.get(name) is not None})
        if "max_steps" not in arguments and metrics.get("steps"):
            arguments["max_steps"] = metrics["steps"]
    return SmallRun(str(folder), config, arguments)


def _read_sweep(path: Path, mode: str | None) -> SmallRun:
    results = _read_json(path)
    try:
        arms = {arm["mode"]: arm for arm in results["arms"] if arm["mode"] != NONE}  # the longest budget stands last
        if mode is None:
            mode = "mup" if "mup" in arms else next(iter(arms), None)
        if mode not in arms:
            raise TransferError(
                f"{path} holds no arm with mup={mode!r}; it has {', '.join(map(repr, arms)) or 'none but none'}"
            )
        arm = arms[mode]
        keys = dict(results["base_configs"][mode])
        check_sizes(keys)
        config = AutoConfig.for_model(keys.pop("model_type"), **keys)
        arguments = {
            **results["training_arguments"],
            "learning_rate": arm["base_learning_rate"],
            "max_steps": arm["max_steps"],
        }
        trials = [
            cell
            for cell in results["cells"]
            if (cell["mode"], cell["value"], cell["max_steps"]) == (mode, arm["base_value"], arm["max_steps"])
        ]
    except TransferError:
        raise
    except Exception as error:  # Transformers checks the kinds of some keys with errors of its own
        raise TransferError(
            f"{path} is no result of recipes/mup_transfer.py ({type(error).__name__}: {describe_error(error)}); give its "
            "results.json, or the output folder of a Trainer run"
        ) from error
    notes: tuple[str, ...] = ()
    std = _read_part(results, "settings", path).get("embedding_std")
    if isinstance(std, int | float) and std != config.initializer_range:
        notes = (
            f"first scale of the embedding: the sweep drew it with std {std:g}, a model draws it with initializer_range",
        )
    return SmallRun(str(path), config, arguments, len(trials), notes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TransferError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise TransferError(f"{path} must hold an object, it holds {type(found).__name__}")
    return found


def _read_part(found: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    part = found.get(name, {})
    if not isinstance(part, dict):
        raise TransferError(
            f"{name!r} in {path} must be an object, it is {json.dumps(part)[:100]}; correct it, or leave it out"
        )
    return part


def _drop_open_steps(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without the -1 that stands for a run which was told its epochs."""
    return {name: value for name, value in arguments.items() if not (name == "max_steps" and value == -1)}


def _number(value: Any) -> Any:
    """`1e-5` is a number to JSON and to people, and a string to YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
