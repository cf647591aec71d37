"""From a tuned small model to the training arguments of a large one, and what the theory does not promise about the step.

The small run is the output folder of a Trainer run (``config.json``, and its training arguments as ``recipes/pretrain.py``
keeps them in ``metrics.json``) or what ``recipes/mup_transfer.py`` wrote about a sweep. Learning rate, weight decay and
epsilon are the base model's, so they are taken over as they are: the large model's configuration turns them into each
tensor's own. ``training_args.bin`` is a pickle and is not read.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from hf_moe_ext.mup.roles import NONE
from hf_moe_ext.mup.settings import BASE_SIZES, MULTIPLIERS
from hf_moe_ext.mup.tuning_cost import Parameters, count_parameters, training_flops

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
_NEEDED_FOR_TOKENS = ("max_steps", "per_device_train_batch_size", "max_length")
_STEP_COUNTS = ("num_decay_steps", "num_stable_steps", "num_warmup_steps")
# Key of the configuration -> what moving along it is called, and why it is not covered.
_UNCOVERED_KEYS = {
    "model_type": "another family of model",
    "moe_block": "another MoE block",
    "num_hidden_layers": "depth: needs rules of its own (CompleteP, arXiv 2505.01618)",
    "num_local_experts": "number of experts at fixed top-k: reported to transfer, but tested under simplep only",
    "num_experts_per_tok": "top-k: held fixed by the theory",
    "vocab_size": "vocabulary, and with it the loss",
    "initializer_range": "std of the first weights: part of what was tuned",
    "router_aux_loss_coef": "weight of the load-balance loss: part of what was tuned",
    "embedding_multiplier": "embedding multiplier: part of what was tuned",
    "residual_multiplier": "residual multiplier: part of what was tuned",
    "norm_topk_prob": "whether routing weights are made to sum to 1",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied embeddings",
    "moe_shared_expert_intermediate_size": None,  # compared as a ratio
}
_UNCOVERED_ARGUMENTS = {
    "max_steps": "number of steps, and with it of tokens: the best rate drifts with the horizon",
    "rows_per_step": "batch size",
    "max_length": "sequence length",
}
NEVER_COVERED = (
    "Depth, batch size, number of steps or tokens, number of experts, top-k, granularity, sequence length, vocabulary and "
    "another optimizer are outside the theory; of the width only the learning rate is claimed to transfer, not weight decay, "
    "first scales or the weights of auxiliary losses."
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


@dataclass(frozen=True)
class Transfer:
    """Training arguments for the target.

    Attributes:
        arguments: as ``recipes/pretrain.py --config`` reads them.
        missing: of ``TRAINING_KEYS`` those that the small run does not tell, so that the Trainer's defaults hold.
        uncovered: how the target differs where the theory says nothing.
        parameters: "small" and "target".
        num_tokens: of one run, "small" and "target"; None where the batch, length or steps are not known.
        num_trials: runs that are counted.
    """

    arguments: dict[str, Any]
    missing: list[str]
    uncovered: list[str]
    parameters: dict[str, Parameters]
    num_tokens: dict[str, int] | None
    num_trials: int

    @property
    def tuning_flops(self) -> dict[str, int] | None:
        """Of all trials at the small size, and of as many at the target's; 6 x active non-embedding parameters x tokens."""
        if self.num_tokens is None:
            return None
        return {
            size: self.num_trials * training_flops(self.parameters[size].active, tokens)
            for size, tokens in self.num_tokens.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"tuning_flops": self.tuning_flops}


def transfer(small: SmallRun, target: Any, model_config: str, changes: Mapping[str, Any] | None = None) -> Transfer:
    """The training arguments of the target.

    Args:
        small: from ``read_small_run``.
        target: configuration of the large model.
        model_config: its file, for the arguments.
        changes: training arguments in which the target's run is to differ from the small one's (``max_steps`` ...).

    Raises:
        TransferError: no µP on a side, another parametrisation, other base sizes, no learning rate.
    """
    _check_parametrisation(small, target)
    if "learning_rate" not in small.arguments:
        raise TransferError(
            f"{small.source} does not tell its learning rate: it needs metrics.json with 'training_arguments' (as "
            "recipes/pretrain.py writes it; training_args.bin is a pickle and is not read); or give --learning-rate, or "
            "--arguments FILE, the YAML of the small run"
        )
    arguments = _scale_steps(small.arguments, dict(changes or {}))
    rows = [_rows_per_step(a) for a in (small.arguments, arguments)]
    lengths = [_count_tokens(a) for a in (small.arguments, arguments)]
    keys = {name: getattr(target, name) for name in ("mup", "mup_form", *BASE_SIZES, *MULTIPLIERS)}
    return Transfer(
        arguments={
            "model_type": target.model_type,
            "model_config": model_config,
            **{name: value for name, value in keys.items() if value is not None},
            **{name: arguments[name] for name in TRAINING_KEYS if name in arguments},
        },
        missing=[name for name in TRAINING_KEYS if name not in arguments],
        uncovered=[
            *small.notes,
            *compare_configs(small.config, target),
            *_compare_arguments(small.arguments | {"rows_per_step": rows[0]}, arguments | {"rows_per_step": rows[1]}),
        ],
        parameters={"small": count_parameters(small.config), "target": count_parameters(target)},
        num_tokens=None if None in lengths else dict(zip(("small", "target"), lengths, strict=True)),  # type: ignore[arg-type]
        num_trials=small.num_trials or 1,
    )


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


def record_training_arguments(args: Any, max_length: int) -> dict[str, Any]:
    """Of ``TrainingArguments`` what a transfer takes over, for a JSON file beside the model.

    Args:
        args: of the run.
        max_length: tokens per row.
    """
    known = args.to_dict()  # enumerations as their values
    return {name: known[name] for name in TRAINING_KEYS if known.get(name) is not None} | {"max_length": max_length}


def read_target(path: str | os.PathLike[str]) -> Any:
    """The configuration of the large model.

    Raises:
        TransferError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).split("\n")[0][:300]
        raise TransferError(
            f"the configuration {path} cannot be read: {reason}; give a config.json of an *_ext model"
        ) from error


def read_arguments(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The training arguments in a YAML or JSON file; other keys are not looked at.

    Raises:
        TransferError: it cannot be read.
    """
    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise TransferError(
            f"--arguments {path} cannot be read: {' '.join(str(error).split())}; give a YAML file"
        ) from error
    if not isinstance(keys, dict):
        raise TransferError(f"--arguments {path} must hold 'argument: value' lines; it holds {type(keys).__name__}")
    return {name: _number(keys[name]) for name in TRAINING_KEYS if keys.get(name) is not None}


def compare_configs(small: Any, target: Any) -> list[str]:
    """Sentences on how two models differ where the theory says nothing about the learning rate."""
    found = []
    for name, sentence in _UNCOVERED_KEYS.items():
        mine, theirs = getattr(small, name, None), getattr(target, name, None)
        if sentence is not None and mine != theirs:
            found.append(f"{sentence} ({name}: {mine} -> {theirs})")
    ratios = {
        "intermediate_size": "granularity: how wide an expert is for the model",
        "moe_latent_size": "how wide the latent is for the model",
        "moe_shared_expert_intermediate_size": "how wide the shared expert is for the model",
    }
    for name, sentence in ratios.items():
        mine, theirs = ((getattr(config, name, 0) or 0) / config.hidden_size for config in (small, target))
        if not math.isclose(mine, theirs, rel_tol=1e-9):
            found.append(f"{sentence} ({name} / hidden_size: {mine:g} -> {theirs:g})")
    mine, theirs = (config.num_attention_heads / config.num_key_value_heads for config in (small, target))
    if mine != theirs:
        found.append(f"how many heads share a key (num_attention_heads / num_key_value_heads: {mine:g} -> {theirs:g})")
    return found


def format_yaml(transfer: Transfer, source: str) -> str:
    """The arguments as ``recipes/pretrain.py --config`` reads them, what is not covered as comments above."""
    lines = [f"# Learning rate of {source} for a larger model, by µP (hf-moe transfer)."]
    lines += [f"# Not covered by the theory: {sentence}" for sentence in transfer.uncovered]
    return "\n".join([*lines, yaml.safe_dump(transfer.arguments, sort_keys=False, allow_unicode=True)])


def _check_parametrisation(small: SmallRun, target: Any) -> None:
    own = small.config
    if getattr(own, "mup", NONE) == NONE:
        raise TransferError(
            f"{small.source} was trained with mup='none': its learning rate says nothing about another width; train the small "
            f"model with mup='mup', mup_base_hidden_size={own.hidden_size} (at its own width that is the same training)"
        )
    wanted = {"mup": own.mup} | {name: getattr(own, name) for name in BASE_SIZES if getattr(own, name) is not None}
    if getattr(target, "mup", NONE) == NONE:
        keys = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in wanted.items())
        raise TransferError(
            f"the target has mup='none', so nothing in it scales with the width; write into its config.json {keys}"
        )
    for name, value in wanted.items():
        found = getattr(target, name)
        if found != value:
            raise TransferError(
                f"{name} must be the small run's, {value!r}, got {found!r} in the target: the learning rate was tuned for that "
                f"base; write {name}={value!r} there"
            )


def _read_trainer_run(folder: Path) -> SmallRun:
    config = read_target(folder)
    arguments: dict[str, Any] = {}
    state = _read_json(folder / "trainer_state.json") if (folder / "trainer_state.json").is_file() else {}
    if state.get("max_steps"):
        arguments["max_steps"] = state["max_steps"]
    if (folder / "metrics.json").is_file():
        metrics = _read_json(folder / "metrics.json")
        settings = metrics.get("settings", {})
        arguments |= {name: settings[name] for name in TRAINING_KEYS if settings.get(name) is not None}
        arguments |= {
            name: value for name, value in metrics.get("training_arguments", {}).items() if name in TRAINING_KEYS
        }
        if arguments.get("max_steps", 0) <= 0 and metrics.get("steps"):  # the run was told its epochs
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
    except (KeyError, TypeError) as error:
        raise TransferError(
            f"{path} is no result of recipes/mup_transfer.py ({type(error).__name__}: {error}); give its results.json, or "
            "the output folder of a Trainer run"
        ) from error
    notes: tuple[str, ...] = ()
    std = results.get("settings", {}).get("embedding_std")
    if std is not None and std != config.initializer_range:
        notes = (
            f"first scale of the embedding: the sweep drew it with std {std:g}, a model draws it with initializer_range",
        )
    return SmallRun(str(path), config, arguments, len(trials), notes)


def _scale_steps(arguments: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The small run's arguments with the changes; counts of steps of the schedule keep their share of the run."""
    result = {**arguments, **changes}
    if "max_steps" not in arguments or result["max_steps"] == arguments["max_steps"]:
        return result
    ratio = result["max_steps"] / arguments["max_steps"]
    if result.get("warmup_steps", 0) >= 1 and "warmup_steps" not in changes:  # below 1 it is a share already
        result["warmup_steps"] = round(arguments["warmup_steps"] * ratio)
    if result.get("lr_scheduler_kwargs"):
        result["lr_scheduler_kwargs"] = {
            name: round(value * ratio) if name in _STEP_COUNTS and value is not None else value
            for name, value in arguments["lr_scheduler_kwargs"].items()
        }
    return result


def _compare_arguments(small: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    return [
        f"{sentence} ({name}: {small.get(name)} -> {target[name]})"
        for name, sentence in _UNCOVERED_ARGUMENTS.items()
        if target.get(name) is not None and small.get(name) != target[name]
    ]


def _rows_per_step(arguments: Mapping[str, Any]) -> int | None:
    rows = arguments.get("per_device_train_batch_size")
    return None if rows is None else int(rows) * int(arguments.get("gradient_accumulation_steps", 1))


def _count_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Of one process' run."""
    if any(not arguments.get(name) for name in _NEEDED_FOR_TOKENS):
        return None
    return int(arguments["max_steps"]) * int(_rows_per_step(arguments) or 0) * int(arguments["max_length"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TransferError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise TransferError(f"{path} must hold an object, it holds {type(found).__name__}")
    return found


def _number(value: Any) -> Any:
    """`1e-5` is a number to JSON and to people, and a string to YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
