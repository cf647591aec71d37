"""From a tuned small model to the training arguments of a large one, and what the theory does not promise about the step.

Learning rate, weight decay and epsilon are the base model's, so they are taken over as they are: the large model's
configuration turns them into each tensor's own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from hf_moe_ext.mup.config_file import describe_error
from hf_moe_ext.mup.roles import MULTIPLIER, MUP, NONE
from hf_moe_ext.mup.settings import BASE_SIZES, MULTIPLIERS, read_head_dim
from hf_moe_ext.mup.small_run import TRAINING_KEYS, SmallRun, TransferError
from hf_moe_ext.mup.training_keys import STEP_COUNTS, check_training_arguments
from hf_moe_ext.mup.tuning_cost import Parameters, count_parameters, training_flops

_NEEDED_FOR_TOKENS = ("max_steps", "per_device_train_batch_size", "max_length")

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
        TransferError: no µP on a side, another parametrisation, other base sizes or multipliers, no learning rate, a
            training argument out of its range.
    """
    _check_parametrisation(small, target)
    if "learning_rate" not in small.arguments:
        raise TransferError(
            f"{small.source} does not tell its learning rate: it needs metrics.json with 'training_arguments' (as "
            "recipes/pretrain.py writes it; training_args.bin is a pickle and is not read); or give --learning-rate, or "
            "--arguments FILE, the YAML of the small run"
        )
    known = check_training_arguments(small.arguments, small.source)
    arguments = _scale_steps(known, check_training_arguments(changes or {}, "the large run"))
    rows = [_rows_per_step(a) for a in (known, arguments)]
    lengths = [_count_tokens(a) for a in (known, arguments)]
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
            *_compare_arguments(known | {"rows_per_step": rows[0]}, arguments | {"rows_per_step": rows[1]}),
        ],
        parameters={"small": _count(small.config, small.source), "target": _count(target, model_config)},
        num_tokens=None if None in lengths else dict(zip(("small", "target"), lengths, strict=True)),  # type: ignore[arg-type]
        num_trials=small.num_trials or 1,
    )


def compare_configs(small: Any, target: Any) -> list[str]:
    """Sentences on how two models differ where the theory says nothing about the learning rate."""
    found = []
    for name, sentence in _UNCOVERED_KEYS.items():
        mine, theirs = getattr(small, name, None), getattr(target, name, None)
        if mine != theirs:
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
    _check_multipliers(own, target)


def _read_shares(config: Any) -> dict[str, float]:
    """What µP makes of the width in each multiplier that hangs on it; the multiplier over it is a tuned number."""
    ratio = config.hidden_size / config.mup_base_hidden_size if config.mup_form == MULTIPLIER else 1.0
    return {
        "logits_scaling": ratio,
        "router_logits_scaling": ratio if config.mup == MUP else 1.0,
        "attention_multiplier": config.mup_base_head_dim**0.5 / read_head_dim(config),
    }


def _check_multipliers(own: Any, target: Any) -> None:
    """Refuse numbers of the small model in the target: they come along when its config.json is copied."""
    mine, theirs = _read_shares(own), _read_shares(target)
    wanted = {  # the small run's own number to the last bit where nothing about it changes
        name: getattr(own, name) * (1 if mine[name] == theirs[name] else theirs[name] / mine[name]) for name in mine
    }
    wrong = [name for name in wanted if not math.isclose(getattr(target, name), wanted[name], rel_tol=1e-9)]
    if not wrong:
        return
    found = ", ".join(f"{name}={getattr(target, name)!r}" for name in wrong)
    open_ones = [name for name in wrong if math.isclose(getattr(own, name), mine[name], rel_tol=1e-9)]
    leave = f" (or leave out {', '.join(open_ones)}: they follow from the sizes)" if open_ones else ""
    raise TransferError(
        f"multipliers of the target must be the small run's at the target's width, got {found} (a copied config.json holds "
        f"the small model's numbers); write {', '.join(f'{name}={wanted[name]!r}' for name in wrong)} there{leave}"
    )


def _scale_steps(arguments: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The small run's arguments with the changes; counts of steps of the schedule keep their share of the run."""
    result = {**arguments, **changes}
    if "max_steps" not in arguments or result["max_steps"] == arguments["max_steps"]:
        return result
    ratio = result["max_steps"] / arguments["max_steps"]
    if result.get("warmup_steps", 0) >= 1 and "warmup_steps" not in changes:  # below 1 it is a share already
        result["warmup_steps"] = round(arguments["warmup_steps"] * ratio)
    if result.get("lr_scheduler_kwargs") and "lr_scheduler_kwargs" not in changes:
        result["lr_scheduler_kwargs"] = {
            name: round(value * ratio) if name in STEP_COUNTS and value is not None else value
            for name, value in arguments["lr_scheduler_kwargs"].items()
        }
    return result


def _compare_arguments(small: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    return [
        f"{sentence} ({name}: {small.get(name)} -> {target[name]})"
        for name, sentence in _UNCOVERED_ARGUMENTS.items()
        if target.get(name) is not None and small.get(name) != target[name]
    ]


def _count(config: Any, source: str) -> Parameters:
    try:
        return count_parameters(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise TransferError(
            f"no model can be built of the configuration of {source}: {describe_error(error)}; correct it"
        ) from error


def _rows_per_step(arguments: Mapping[str, Any]) -> int | None:
    rows = arguments.get("per_device_train_batch_size")
    return None if rows is None else int(rows) * int(arguments.get("gradient_accumulation_steps", 1))


def _count_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Of one process' run."""
    if any(not arguments.get(name) for name in _NEEDED_FOR_TOKENS):
        return None
    return int(arguments["max_steps"]) * int(_rows_per_step(arguments) or 0) * int(arguments["max_length"])
