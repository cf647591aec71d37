"""The arguments of `mup_transfer.py`, and the sweep they describe."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune_arguments import UserError
from hf_moe_ext import MixtralExtConfig, OlmoeExtConfig
from hf_moe_ext.mup import AXES, Sweep
from quickstart.corpus import read_corpus

MODES = ("mup", "none", "simplep")
DEFAULT_VALUES = {
    "hidden_size": (32, 64, 128, 256),
    "num_experts": (8, 16, 32),
    "top_k": (2, 4),
    "granularity": (1, 2, 4),
}
METRIC = "eval_nats_per_token"
VOCAB_SIZE = 256  # bytes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


def parse_transfer_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an unknown argument, or a value outside its range.
    """
    parser = _Parser(prog="mup_transfer.py", allow_abbrev=False, description=__doc__)
    _add_sweep(parser)
    _add_model(parser)
    _add_training(parser)
    arguments = parser.parse_args(list(argv))
    if arguments.values is None:
        arguments.values = list(DEFAULT_VALUES[arguments.axis])
    least = {"num_processes": 1, "num_threads": 1, "length": 2, "batch_size": 1, "num_held_out_rows": 1}
    sizes = ("base_hidden_size", "intermediate_ratio", "head_dim", "num_hidden_layers", "num_experts", "top_k")
    least |= dict.fromkeys(sizes, 1) | {"router_aux_loss_coef": 0}
    for name, limit in {**least, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "adam_epsilon": 0}.items():
        if not getattr(arguments, name) >= limit:
            raise UserError(f"--{name} must be at least {limit}, got {getattr(arguments, name)}.")
    if arguments.hidden_size is not None and arguments.hidden_size < 1:
        raise UserError(f"--hidden_size must be at least 1, got {arguments.hidden_size}.")
    for name in ("initializer_range", "embedding_std"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name} must be a number above 0, got {getattr(arguments, name)}.")
    for name in ("stable_until", "final_lr_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} must be from 0 to 1, got {getattr(arguments, name)}.")
    for steps in arguments.max_steps:
        if arguments.warmup_steps > round(arguments.stable_until * steps):
            raise UserError(
                f"--warmup_steps {arguments.warmup_steps} must end before the rate comes down, at step "
                f"{round(arguments.stable_until * steps)} of --max_steps {steps}. Lower it, or raise --max_steps."
            )
    return arguments


def build_sweep(arguments: argparse.Namespace) -> Sweep:
    """The sweep of the arguments.

    Raises:
        UserError: a size that cannot be, an axis that cannot take a value.
    """
    try:
        sweep = Sweep(
            base_config=build_base_config(arguments),
            axis=arguments.axis,
            values=tuple(arguments.values),
            learning_rates={
                mode: tuple(
                    arguments.standard_learning_rates
                    if mode == "none" and arguments.standard_learning_rates
                    else arguments.learning_rates
                )
                for mode in arguments.modes
            },
            seeds=tuple(arguments.seeds),
            max_steps=tuple(arguments.max_steps),
            hidden_size=arguments.hidden_size,
            metric=METRIC,
            settings=describe_settings(arguments),
        )
        for cell in {(cell.mode, cell.value): cell for cell in sweep.cells()}.values():
            config = sweep.configure(cell)
            active, experts = config.num_experts_per_tok, config.num_local_experts
            if active > experts:
                raise UserError(
                    f"{cell.value}: {active} active experts of {experts}; top_k can be no more than num_experts."
                )
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return sweep


def build_base_config(arguments: argparse.Namespace) -> Any:
    """The base model: the width whose learning rate is tuned."""
    width, head_dim = arguments.base_hidden_size, arguments.head_dim
    if width % head_dim:
        raise UserError(f"--base_hidden_size must be a multiple of --head_dim {head_dim}, got {width}.")
    keys: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": arguments.intermediate_ratio * width,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": width // head_dim,
        "num_key_value_heads": width // head_dim,
        "num_experts_per_tok": arguments.top_k,
        "max_position_embeddings": arguments.length,
        "initializer_range": arguments.initializer_range,
        "router_aux_loss_coef": arguments.router_aux_loss_coef,
        "output_router_logits": True,  # adds the load-balance loss
        "tie_word_embeddings": False,
        "use_cache": False,
        "moe_block": arguments.moe_block,
        # Bytes have no special tokens.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if arguments.model_type == "mixtral_ext":
        return MixtralExtConfig(**keys, num_local_experts=arguments.num_experts, head_dim=head_dim)
    return OlmoeExtConfig(**keys, num_experts=arguments.num_experts)


def describe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What makes a run this run and no other, beside its model and its cell."""
    names = (
        "embedding_std",
        "length",
        "batch_size",
        "num_held_out_rows",
        "warmup_steps",
        "stable_until",
        "final_lr_ratio",
        "weight_decay",
        "adam_epsilon",
        "max_grad_norm",
    )
    try:
        corpus = read_corpus(arguments.source_dir)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return {**{name: getattr(arguments, name) for name in names}, "corpus": corpus.fingerprint[:16]}


def read_rate(text: str) -> float:
    """`2^-6` or `0.0156`."""
    try:
        rate = 2.0 ** int(text.removeprefix("2^")) if text.startswith("2^") else float(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"must be a number or 2^k, got {text!r}") from error
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return rate


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep")
    group.add_argument("--axis", choices=list(AXES), default="hidden_size", help="What grows.")
    group.add_argument("--values", type=int, nargs="+", help="Of the axis; the first one's best rate is given to all.")
    group.add_argument("--modes", choices=MODES, nargs="+", default=["mup", "none"], help="Parametrisations.")
    rates = [f"2^{power}" for power in range(-8, -3)]
    group.add_argument(
        "--learning_rates", type=read_rate, nargs="+", default=[read_rate(rate) for rate in rates],
        help="At the base; numbers or 2^k. [default: 2^-8 ... 2^-4]",
    )  # fmt: skip
    group.add_argument(
        "--standard_learning_rates", type=read_rate, nargs="+", default=[2.0**power for power in range(-10, -4)],
        help="Those of --modes none, whose best rates fall as the model grows. [default: 2^-10 ... 2^-5]",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", default=[0], help="Of first weights and order of rows.")
    group.add_argument("--max_steps", type=int, nargs="+", default=[150], help="One budget or more, in steps.")
    group.add_argument("--num_processes", type=int, default=1, help="Cells at a time.")
    group.add_argument("--num_threads", type=int, default=1, help="Threads of each.")
    group.add_argument("--output_dir", type=Path, default=Path("outputs/mup_transfer"), help="Folder of the cells.")
    group.add_argument("--report", type=Path, help="JSON, md and png by this name. [default: results in --output_dir]")
    group.add_argument("--report_only", action="store_true", help="Report on the cells there are; run none.")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument("--model_type", choices=["mixtral_ext", "olmoe_ext"], default="mixtral_ext", help="Family.")
    group.add_argument("--moe_block", choices=["standard", "dcca"], default="standard", help="MoE block.")
    group.add_argument("--base_hidden_size", type=int, default=32, help="Width of the base model.")
    group.add_argument("--hidden_size", type=int, help="Width of all cells where another axis is swept.")
    group.add_argument("--intermediate_ratio", type=int, default=2, help="Width of an expert over the model's.")
    group.add_argument("--head_dim", type=int, default=16, help="Of an attention head; heads are added with the width.")
    group.add_argument("--num_hidden_layers", type=int, default=2, help="Layers.")
    group.add_argument("--num_experts", type=int, default=8, help="Experts.")
    group.add_argument("--top_k", type=int, default=2, help="Experts per token.")
    group.add_argument("--initializer_range", type=float, default=0.1, help="Std of the first weights at the base.")
    group.add_argument("--embedding_std", type=float, default=0.5, help="Std of the embedding's first weights.")
    group.add_argument("--router_aux_loss_coef", type=float, default=0.01, help="Weight of the load-balance loss.")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--source_dir", help="Folder of Python files in place of the standard library.")
    group.add_argument("--length", type=int, default=64, help="Bytes per row.")
    group.add_argument("--batch_size", type=int, default=16, help="Rows per step.")
    group.add_argument("--num_held_out_rows", type=int, default=64, help="Rows the loss is measured on.")
    group.add_argument("--warmup_steps", type=int, default=20, help="Steps of linear warm-up.")
    group.add_argument("--stable_until", type=float, default=0.6, help="Share of the steps after which the rate falls.")
    group.add_argument("--final_lr_ratio", type=float, default=0.1, help="Where it ends, over its peak.")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's, independent.")
    group.add_argument(
        "--adam_epsilon", type=float, default=1e-12, help="AdamW's, at the base; so small it is no matter."
    )
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="Clipping; 0: none.")
    group.add_argument("--use_cpu", action="store_true", help="Even if there is a GPU.")
