"""The arguments of `upcycle.py`: the dense parent, what it becomes, and the training that all arms share."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune_arguments import LayoutArguments, RecipeParser, UserError, read_words
from pretrain_arguments import SOURCE, PretrainDataArguments, PretrainTrainingArguments
from quickstart.pretrain import BaseSettings

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "upcycle.yaml"
QUICKSTART_PARENT = "quickstart"
LOW_RANK, SPARSE, VANILLA, DENSE = "low_rank", "sparse", "vanilla", "dense"
ARMS = (LOW_RANK, SPARSE, VANILLA, DENSE)


@dataclass
class UpcycleModelArguments(LayoutArguments):
    """Which dense model, and what is made of it."""

    parent: str = field(
        default=QUICKSTART_PARENT,
        metadata={
            "help": "Llama, Mistral or Qwen3 of the Hub or a folder; 'quickstart' pre-trains a small Llama, once."
        },
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={
            "help": "What is trained: low_rank, sparse (base and deltas), vanilla (every expert a full copy), dense (the "
            "parent itself goes on)."
        },
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per upcycled layer."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    layers: str = field(default="all", metadata={"help": "all, every-other, or a list such as 0-3,6."})
    rank: int = field(default=4, metadata={"help": "Of low-rank deltas."})
    drop_rate: float = field(default=0.9, metadata={"help": "Share of a sparse delta's entries that are zero."})
    universal: Literal["none", "keep", "extend"] = field(
        default="none",
        metadata={"help": "An FFN that every token passes: none, whole, or one more delta on the shared base."},
    )
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balance loss."})
    delta_learning_rate_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of the deltas over --learning_rate, which everything else has."}
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Type the weights are held in."})


@dataclass
class ParentArguments:
    """The quickstart's dense parent; they mean nothing for another one."""

    parent_hidden_size: int = field(default=192, metadata={"help": "Width."})
    parent_intermediate_size: int = field(default=512, metadata={"help": "Inner width of an FFN."})
    parent_num_layers: int = field(default=4, metadata={"help": "Blocks."})
    parent_vocab_size: int = field(default=4096, metadata={"help": "Entries of the tokenizer."})
    parent_max_steps: int = field(default=800, metadata={"help": "Steps of pre-training, 1024 tokens each."})
    parent_seed: int = field(default=0, metadata={"help": "Of its weights and its order of rows."})

    def settings(self, source_dir: str | None) -> BaseSettings:
        """What `quickstart.pretrain` builds."""
        return BaseSettings(
            vocab_size=self.parent_vocab_size,
            hidden_size=self.parent_hidden_size,
            intermediate_size=self.parent_intermediate_size,
            num_hidden_layers=self.parent_num_layers,
            num_attention_heads=max(1, self.parent_hidden_size // 32),
            num_experts=0,
            top_k=0,
            max_steps=self.parent_max_steps,
            seed=self.parent_seed,
            source_dir=source_dir,
        )


@dataclass(frozen=True)
class UpcycleArguments:
    """All of them, checked."""

    model: UpcycleModelArguments
    data: PretrainDataArguments
    parent: ParentArguments
    training: PretrainTrainingArguments
    push_to_hub: bool = False

    @property
    def output_dir(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))

    def describe(self) -> dict[str, Any]:
        """What makes a run this run and no other: what is trained on what, not how long or where."""
        layout = [f.name for f in dataclasses.fields(LayoutArguments)]
        unread = ("cache_dir", "max_eval_samples", "max_curve_samples", "ngram_baseline", "tokenizer_name_or_path")
        model, data = dataclasses.asdict(self.model), dataclasses.asdict(self.data)
        return {
            **{name: value for name, value in model.items() if name not in layout},
            **{name: value for name, value in data.items() if name not in unread},
            **(dataclasses.asdict(self.parent) if self.model.parent == QUICKSTART_PARENT else {}),
            "seed": self.training.seed,
            "learning_rate": self.training.learning_rate,
        }


def parse_upcycle_arguments(argv: Sequence[str] | None = None) -> UpcycleArguments:
    """Read the command line and, under it, the YAML file of `--config`.

    Without `--config` and without `--parent`, `configs/upcycle.yaml` is the file.

    Raises:
        UserError: An unknown or meaningless argument or key.
    """
    kinds: list[Any] = [UpcycleModelArguments, PretrainDataArguments, ParentArguments, PretrainTrainingArguments]
    parser = RecipeParser(kinds, prog="upcycle.py", allow_abbrev=False, description=__doc__)
    given = list(sys.argv[1:] if argv is None else argv)
    own = any(word.split("=")[0] == "--parent" for word in given)
    (model, data, parent, training), _ = read_words(parser, given, None if own else DEFAULT_CONFIG)
    arguments = UpcycleArguments(model, data, parent, training, training.push_to_hub)
    training.push_to_hub = False  # Trainer would push after every save
    _check_values(arguments)
    return arguments


def _check_values(arguments: UpcycleArguments) -> None:
    model, data = arguments.model, arguments.data
    unknown = [arm for arm in model.arms if arm not in ARMS]
    if unknown or not model.arms or len(set(model.arms)) < len(model.arms):
        raise UserError(f"--arms must be some of {', '.join(ARMS)}, each once; got {' '.join(model.arms) or 'none'}.")
    if not 0 < model.delta_learning_rate_ratio < float("inf"):
        raise UserError(f"--delta_learning_rate_ratio must be above 0, got {model.delta_learning_rate_ratio}.")
    if data.tokenizer_name_or_path != "trained":
        raise UserError("--tokenizer_name_or_path: the parent's own tokenizer is used; leave it out.")
    if model.parent != QUICKSTART_PARENT:
        given = [f.name for f in dataclasses.fields(ParentArguments) if getattr(arguments.parent, f.name) != f.default]
        if given:
            raise UserError(
                f"--{given[0]} is for the quickstart's parent, and --parent is {model.parent}; leave it out."
            )
    elif data.dataset_name != SOURCE:
        raise UserError(
            f"--dataset_name {data.dataset_name}: the quickstart's parent has read Python only. Give --parent a model of "
            "your own, or leave --dataset_name out."
        )
    if arguments.push_to_hub and len(model.arms) > 1:
        raise UserError("--push_to_hub true pushes one model: give --arms one name.")
    least = {"parent_hidden_size": 32, "parent_intermediate_size": 1, "parent_num_layers": 1, "parent_max_steps": 1}
    for name, limit in {**least, "parent_vocab_size": 258}.items():
        if getattr(arguments.parent, name) < limit:
            raise UserError(f"--{name} must be at least {limit}, got {getattr(arguments.parent, name)}.")
    if arguments.parent.parent_hidden_size % 32:
        raise UserError(f"--parent_hidden_size must be a multiple of 32, got {arguments.parent.parent_hidden_size}.")
    for name, limit in (("max_length", 2), ("max_train_samples", 1), ("max_eval_samples", 1)):
        value = getattr(data, name)
        if value is not None and value < limit:
            raise UserError(f"--{name} must be at least {limit}, got {value}.")
