"""The arguments of `sparsity_grid.py`, and the cells they describe: shapes of given sizes and sparsities, budgets, seeds."""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from finetune_arguments import UserError
from hf_moe_ext import OlmoeExtConfig
from hf_moe_ext.scaling.feed_forward import MoeFfn
from hf_moe_ext.scaling.shape import MoeShape
from mup_transfer_arguments import VOCAB_SIZE, read_rate
from quickstart.corpus import read_corpus

NUM_HEADS, WIDTH_STEP = 2, 4
BASE_HIDDEN_SIZE, BASE_INTERMEDIATE_SIZE, BASE_HEAD_DIM = 32, 64, 16
LARGEST_HIDDEN_SIZE = 1024
SEARCH_SEED = 1000  # no seed of the grid
SMOKE: dict[str, Any] = {
    "total_parameters": [20_000.0, 40_000.0],
    "num_experts": [2, 4, 8],
    "budget_flops": [2e8],
    "seeds": [0, 1],
    "learning_rates": [2.0**-6],
    "length": 32,
    "batch_size": 4,
    "num_held_out_rows": 8,
    "num_answer_rows": 8,
    "expert_parallel": 2,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the arguments)")


@dataclass(frozen=True)
class GridCell:
    """One training run.

    Attributes:
        total_parameters: nominal N; the model's own is the nearest that its widths allow.
        num_experts: E of a layer.
        budget_flops: C of the training, forward and backward.
        learning_rate: at the base width.
        seed: of the first weights and of the order of the rows.
    """

    total_parameters: float
    num_experts: int
    budget_flops: float
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its file's name, less the ending."""
        return (
            f"N-{self.total_parameters:g}-E-{self.num_experts}-C-{self.budget_flops:g}-lr-{self.learning_rate!r}-"
            f"seed-{self.seed}"
        )


def parse_grid_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an unknown argument, or a value outside its range.
    """
    parser = _Parser(prog="sparsity_grid.py", allow_abbrev=False, description=__doc__)
    _add_grid(parser)
    _add_training(parser)
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    arguments = parser.parse_args(list(argv))
    _check(arguments)
    if arguments.search_parameters is None:
        arguments.search_parameters = arguments.total_parameters[min(1, len(arguments.total_parameters) - 1)]
    if arguments.search_budget_flops is None:
        arguments.search_budget_flops = arguments.budget_flops[len(arguments.budget_flops) // 2]
    return arguments


def describe_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What makes a cell this cell and no other, beside its model and its own values.

    Raises:
        UserError: no text to train on.
    """
    names = (
        "num_hidden_layers", "top_k", "length", "batch_size", "num_held_out_rows", "num_answer_rows", "warmup_fraction",
        "stable_until", "final_lr_ratio", "weight_decay", "adam_epsilon", "max_grad_norm", "initializer_range",
        "embedding_std", "router_aux_loss_coef", "expert_parallel",
    )  # fmt: skip
    try:
        corpus = read_corpus(arguments.source_dir)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in arguments.reasoning_file}
    return {**{name: getattr(arguments, name) for name in names}, "corpus": corpus.fingerprint[:16], "reasoning": files}


def list_search_cells(arguments: argparse.Namespace) -> list[GridCell]:
    """The runs that choose a learning rate for each number of experts: one size, one budget, a seed of their own."""
    size, budget = arguments.search_parameters, arguments.search_budget_flops
    return [
        GridCell(size, experts, budget, rate, SEARCH_SEED)
        for experts in arguments.num_experts
        for rate in arguments.learning_rates
    ]


def list_grid_cells(arguments: argparse.Namespace, learning_rates: dict[int, float]) -> list[GridCell]:
    """All cells of the grid, all seeds of a budget and size together: a grid that is stopped has whole groups.

    Args:
        arguments: Checked arguments.
        learning_rates: Number of experts -> rate.
    """
    return [
        GridCell(size, experts, budget, learning_rates[experts], seed)
        for budget in arguments.budget_flops
        for size in reversed(arguments.total_parameters)
        for seed in arguments.seeds
        for experts in arguments.num_experts
    ]


def choose_widths(total_parameters: float, num_experts: int, arguments: argparse.Namespace) -> tuple[int, int]:
    """Width and expert width of the model nearest to N: the active experts are together about 4 widths wide.

    Raises:
        UserError: no width gives this many parameters.
    """
    ratio = 4 / arguments.top_k
    best = (math.inf, 0, 0)
    for width in range(2 * WIDTH_STEP, LARGEST_HIDDEN_SIZE + 1, WIDTH_STEP):
        nearest = []
        for inner in range(WIDTH_STEP, round(2 * ratio * width) + 1, WIDTH_STEP):
            off = abs(math.log(_count(width, inner, num_experts, arguments) / total_parameters))
            nearest.append((off + 0.3 * abs(math.log(inner / (ratio * width))), width, inner))
        best = min([best, *nearest])
        if _count(width, WIDTH_STEP, num_experts, arguments) > total_parameters:
            break
    found = _count(best[1], best[2], num_experts, arguments)
    if abs(found / total_parameters - 1) > 0.1:
        raise UserError(
            f"--total_parameters {total_parameters:g} with {num_experts} experts: the nearest model has {found:,}, more than "
            "10% off. Choose another number, or fewer experts."
        )
    return best[1], best[2]


def _count(width: int, inner: int, num_experts: int, arguments: argparse.Namespace) -> int:
    ffn = MoeFfn(num_experts, arguments.top_k, inner)
    layers, length = arguments.num_hidden_layers, arguments.length
    shape = MoeShape.uniform(layers, width, ffn, num_heads=NUM_HEADS, vocab_size=VOCAB_SIZE, context_length=length)
    return shape.total_parameters


def build_config(cell: GridCell, arguments: argparse.Namespace) -> Any:
    """The model of a cell, in µP: a rate chosen at one width serves the others."""
    width, inner = choose_widths(cell.total_parameters, cell.num_experts, arguments)
    return OlmoeExtConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        num_experts=cell.num_experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,  # the block's scale does not depend on the number of experts
        max_position_embeddings=arguments.length,
        initializer_range=arguments.initializer_range,
        router_aux_loss_coef=arguments.router_aux_loss_coef,
        output_router_logits=True,  # adds the load-balance loss
        tie_word_embeddings=False,
        use_cache=False,
        mup="mup",
        mup_base_hidden_size=BASE_HIDDEN_SIZE,
        mup_base_intermediate_size=BASE_INTERMEDIATE_SIZE,
        mup_base_head_dim=BASE_HEAD_DIM,
        # Bytes have no special tokens.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def describe_cell(cell: GridCell, arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What a finished cell's file must say for it to be this cell."""
    width, inner = choose_widths(cell.total_parameters, cell.num_experts, arguments)
    return {"cell": dataclasses.asdict(cell), "settings": settings | {"hidden_size": width, "intermediate_size": inner}}


def _check(arguments: argparse.Namespace) -> None:
    for name in ("total_parameters", "num_experts", "budget_flops", "seeds", "learning_rates"):
        entries = getattr(arguments, name)
        if len(set(entries)) != len(entries):
            raise UserError(f"--{name} must hold nothing twice, got {' '.join(map(str, entries))}.")
        if name != "seeds" and not all(0 < entry < math.inf for entry in entries):
            raise UserError(f"--{name} must be positive numbers, got {' '.join(map(str, entries))}.")
    least = {"num_processes": 1, "num_threads": 1, "length": 2, "batch_size": 1, "num_held_out_rows": 1}
    least |= {"num_hidden_layers": 1, "top_k": 1, "expert_parallel": 1, "num_answer_rows": 1}
    for name, limit in {**least, "weight_decay": 0, "max_grad_norm": 0, "adam_epsilon": 0}.items():
        if not getattr(arguments, name) >= limit:
            raise UserError(f"--{name} must be at least {limit}, got {getattr(arguments, name)}.")
    for name in ("warmup_fraction", "stable_until", "final_lr_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} must be from 0 to 1, got {getattr(arguments, name)}.")
    if arguments.warmup_fraction > arguments.stable_until:
        raise UserError(
            f"--warmup_fraction {arguments.warmup_fraction} must not be above --stable_until {arguments.stable_until}."
        )
    if min(arguments.num_experts) < arguments.top_k:
        raise UserError(
            f"--num_experts {min(arguments.num_experts)} is below --top_k {arguments.top_k}. {arguments.top_k} experts are "
            "the dense equivalent, S = 0."
        )
    if SEARCH_SEED in arguments.seeds:
        raise UserError(f"--seeds must not hold {SEARCH_SEED}, the seed of the search for learning rates.")
    for path in arguments.reasoning_file:
        if not path.is_file():
            raise UserError(f"--reasoning_file {path} is no file. Give JSON lines with instruction and output.")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument("--smoke", action="store_true", help="A grid of seconds, to see it work.")
    group.add_argument(
        "--total_parameters", type=float, nargs="+", default=[32e3, 64e3, 128e3, 256e3],
        help="Sizes N: all parameters, with both embeddings.",
    )  # fmt: skip
    group.add_argument(
        "--num_experts", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="E; sparsity S = 1 - top_k/E."
    )
    group.add_argument("--top_k", type=int, default=2, help="Experts per token, of all cells.")
    group.add_argument(
        "--budget_flops", type=float, nargs="+", default=[2e10, 6e10, 1.6e11],
        help="Budgets C in training FLOPs; steps follow.",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of first weights and order of rows.")
    group.add_argument(
        "--learning_rates", type=read_rate, nargs="+", default=[2.0**power for power in range(-8, -4)],
        help="At the base width, numbers or 2^k; one is chosen per number of experts. [default: 2^-8 ... 2^-5]",
    )  # fmt: skip
    group.add_argument("--search_parameters", type=float, help="N at which it is chosen. [default: the second]")
    group.add_argument("--search_budget_flops", type=float, help="C at which it is chosen. [default: the middle one]")
    group.add_argument("--num_hidden_layers", type=int, default=2, help="Layers.")
    group.add_argument("--expert_parallel", type=int, default=2, help="Ranks that the bytes per token are stated for.")
    group.add_argument("--num_processes", type=int, default=1, help="Cells at a time.")
    group.add_argument("--num_threads", type=int, default=1, help="Threads of each.")
    group.add_argument("--output_dir", type=Path, default=Path("outputs/sparsity_grid"), help="Cells and runs.csv.")
    group.add_argument("--report", type=Path, help="JSON, md and png by this name. [default: results in --output_dir]")
    group.add_argument(
        "--fits", type=Path, nargs="+", default=[], help="Fits that fit_law.py wrote of runs.csv, for the report."
    )
    group.add_argument("--report_only", action="store_true", help="Report on the cells there are; run none.")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--source_dir", help="Folder of Python files in place of the standard library.")
    group.add_argument(
        "--reasoning_file", type=Path, nargs="+", default=[],
        help="JSON lines (.gz too) of instruction and output, or prompt and completion: loss of the answers.",
    )  # fmt: skip
    group.add_argument("--num_answer_rows", type=int, default=128, help="Rows of each such file, its first ones.")
    group.add_argument("--length", type=int, default=128, help="Bytes per row.")
    group.add_argument("--batch_size", type=int, default=4, help="Rows per step.")
    group.add_argument("--num_held_out_rows", type=int, default=256, help="Rows the loss is measured on.")
    group.add_argument("--warmup_fraction", type=float, default=0.1, help="Share of the steps with linear warm-up.")
    group.add_argument("--stable_until", type=float, default=0.6, help="Share of the steps after which the rate falls.")
    group.add_argument("--final_lr_ratio", type=float, default=0.05, help="Where it ends, over its peak.")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's, independent.")
    group.add_argument("--adam_epsilon", type=float, default=1e-12, help="AdamW's, at the base.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Clipping; 0: none.")
    group.add_argument("--initializer_range", type=float, default=0.1, help="Std of the first weights at the base.")
    group.add_argument("--embedding_std", type=float, default=0.5, help="Std of the embedding's first weights.")
    group.add_argument("--router_aux_loss_coef", type=float, default=0.01, help="Weight of the load-balance loss.")
    group.add_argument("--use_cpu", action="store_true", help="Even if there is a GPU.")
