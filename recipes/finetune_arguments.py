"""The arguments of `finetune.py`: dataclasses, YAML files, and the checks that need no model and no data."""

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import yaml
from transformers import HfArgumentParser, TrainingArguments

QUICKSTART_MODEL = "quickstart"
QUICKSTART_CONFIG = Path(__file__).resolve().parent / "configs" / "quickstart_r.yaml"
BUILT_IN_DATASETS = ("docstrings", "arithmetic", "reasoning")


class UserError(Exception):
    """Something the user asked for cannot be done; the message names the argument, the rule and the next step."""


@dataclass
class LayoutArguments:
    """How one model is spread over the processes."""

    fsdp_size: int | None = field(default=None, metadata={"help": "Spread all weights over so many processes (FSDP)."})
    ep_size: int | None = field(default=None, metadata={"help": "Spread the experts over so many processes."})
    tp_size: int | None = field(
        default=None,
        metadata={"help": "Split attention and experts over so many processes of one batch (accelerators)."},
    )
    ep_implementation: str | None = field(
        default=None,
        metadata={"help": "How tokens reach the experts of other processes: all_to_all, latent_all_to_all ..."},
    )


@dataclass
class ModelArguments(LayoutArguments):
    """Which model is fine-tuned."""

    model_name_or_path: str = field(
        default=QUICKSTART_MODEL,
        metadata={"help": "Model of the Hub or folder; 'quickstart' pre-trains a small one on this machine, once."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type the base model is loaded in; adapters stay float32."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention: sdpa, flash_attention_2 ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class SourceArguments:
    """Where rows come from."""

    dataset_name: str = field(
        default="docstrings",
        metadata={
            "help": "Data set of the Hub, folder, or json/jsonl/csv/tsv/parquet/txt file (also .gz); or built in: "
            "docstrings, arithmetic, reasoning. Columns: text | prompt, completion | instruction, [input,] output | "
            "messages."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to measure on; a tenth of the train split when there is none."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of boolq_*.jsonl.gz and ARC-Easy_*.jsonl.gz, for 'reasoning'."}
    )
    max_length: int = field(
        default=256, metadata={"help": "Tokens per row; what is too much is cut from the prompt's left."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn by --seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on so many rows, drawn by --seed."})


@dataclass
class DataArguments(SourceArguments):
    """Which rows it is trained and measured on."""

    num_generations: int | None = field(
        default=None, metadata={"help": "Held-out rows to write answers for; all for 'docstrings', else 8."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest written answer, in tokens."})
    answer_choices_metric: bool = field(
        default=False,
        metadata={"help": "Accuracy among answer choices; rows need 'answer' and 'choices' or 'Answer format: a/b'."},
    )


@dataclass
class AdapterArguments:
    """What is trained. Fields left out take the variant's default in PerftConfig."""

    peft: Literal["perft", "lora", "full", "none"] = field(
        default="perft", metadata={"help": "perft, LoRA on attention, all weights, or none (measure only)."}
    )
    variant: Literal["R", "E", "D", "S"] = field(
        default="R", metadata={"help": "R own router, E the base's router, D dense, S single."}
    )
    adapter: Literal["lora", "parallel"] = field(default="lora", metadata={"help": "Kind of one PERFT adapter."})
    r: int = field(default=16, metadata={"aliases": ["--lora_r"], "help": "Rank, or width of the bottleneck."})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA scale times r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapters."})
    num_experts: int | None = field(default=None, metadata={"help": "Adapters per block (R and D)."})
    top_k: int | None = field(default=None, metadata={"help": "Adapters per token (R)."})
    normalize_top_k: bool | None = field(default=None, metadata={"help": "R: let a token's weights sum to one."})
    router_aux_loss_coef: float | None = field(default=None, metadata={"help": "R: weight of the balance loss."})
    router_z_loss_coef: float | None = field(default=None, metadata={"help": "R: weight of the router's z-loss."})
    router_aux_loss_scope: Literal["batch", "sequence", "global"] | None = field(
        default=None, metadata={"help": "R: tokens over which the load is balanced: micro-batch, sequence, last step."}
    )
    base_router: Literal["frozen", "lora", "train"] = field(
        default="frozen", metadata={"help": "What of the base model's own router trains with the adapter."}
    )
    base_router_drift_coef: float | None = field(
        default=None, metadata={"help": "How strongly a tuned base router is held near where it started."}
    )
    shared_A: bool = field(default=False, metadata={"help": "R, E, D: one A for all adapters of a layer."})
    expert_fraction: float | None = field(
        default=None,
        metadata={"help": "E: adapt only this share of each layer's experts, those the train rows use most."},
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers (R's own, a tuned base router)."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; q_proj v_proj for lora, every MoE block for perft."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "lora: adapt the experts' own weights, as in experts.gate_up_proj experts.down_proj."},
    )


@dataclass
class QuickstartArguments:
    """The quickstart's base model; they mean nothing for another model."""

    base_cache_dir: str | None = field(
        default=None, metadata={"help": "Where the pre-trained base is kept; the parent of --output_dir."}
    )
    base_max_steps: int | None = field(default=None, metadata={"help": "Steps of pre-training."})
    base_seed: int = field(default=0, metadata={"help": "Seed of pre-training."})
    base_source_dir: str | None = field(
        default=None, metadata={"help": "Folder of Python files to learn from, in place of the standard library."}
    )
    allow_weak_base: bool = field(
        default=False, metadata={"help": "Go on with a base that does not beat the n-gram (for short trials)."}
    )


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """Trainer's own arguments, and whether an output folder may be used again."""

    output_dir: str | None = field(default="outputs/finetune", metadata={"help": "Folder that gets everything."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the earlier run in --output_dir and start anew."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - HfArgumentParser reads the order, as TrainingArguments has it
        default="none", metadata={"help": "Where Trainer reports to: tensorboard, wandb ..."}
    )


@dataclass(frozen=True)
class Arguments:
    """All of them, checked."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    quickstart: QuickstartArguments
    training: FinetuneTrainingArguments
    push_to_hub: bool

    @property
    def output_dir(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))

    def describe(self) -> dict[str, Any]:
        """What makes a run this run and no other: what is trained on what, not how long or where."""
        model = dataclasses.asdict(self.model)
        layout = [f.name for f in dataclasses.fields(LayoutArguments)]
        data = dataclasses.asdict(self.data)
        measured = ("max_eval_samples", "num_generations", "max_new_tokens", "answer_choices_metric")
        quickstart = dataclasses.asdict(self.quickstart)
        return {
            **{name: value for name, value in model.items() if name not in layout},
            **{name: value for name, value in data.items() if name not in measured},
            **dataclasses.asdict(self.adapter),
            **{name: quickstart[name] for name in ("base_max_steps", "base_seed", "base_source_dir")},
            "seed": self.training.seed,
            "learning_rate": self.training.learning_rate,
        }


class ReadsRows(Protocol):
    """What reading rows needs of a recipe's arguments."""

    @property
    def data(self) -> SourceArguments: ...

    @property
    def training(self) -> TrainingArguments: ...


class RecipeParser(HfArgumentParser):
    """Its mistakes are the recipe's own errors."""

    def error(self, message: str) -> NoReturn:
        """One line in place of the two hundred arguments argparse would print."""
        raise UserError(f"{message}. See --help for every argument.")


_DATACLASSES: tuple[Any, ...] = (
    ModelArguments,
    DataArguments,
    AdapterArguments,
    QuickstartArguments,
    FinetuneTrainingArguments,
)


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line and, under it, the YAML file of `--config`.

    Without `--config` and without `--model_name_or_path`, `configs/quickstart_r.yaml` is the file.

    Raises:
        UserError: An unknown or meaningless argument or key.
    """
    parser = RecipeParser(list(_DATACLASSES), prog="finetune.py", allow_abbrev=False, description=__doc__)
    given = list(sys.argv[1:] if argv is None else argv)
    default = None if any(word.split("=")[0] == "--model_name_or_path" for word in given) else QUICKSTART_CONFIG
    parsed, _ = read_words(parser, given, default)
    model, data, adapter, quickstart, training = parsed
    arguments = Arguments(model, data, adapter, quickstart, training, training.push_to_hub)
    training.push_to_hub = False  # Trainer would push after every save; the finished folder is pushed once, at the end
    _check_values(arguments)
    return arguments


def read_words(parser: RecipeParser, words: Sequence[str], default: Path | None) -> tuple[list[Any], dict[str, Any]]:
    """Read command-line words and, under them, the YAML file of `--config`.

    Args:
        parser: Of the recipe.
        words: The command line.
        default: The YAML file when `--config` is not given; None for none.

    Returns:
        The parser's dataclasses, and what else was added to it by name.

    Raises:
        UserError: An unknown or meaningless argument or key.
    """
    parser.add_argument("--config", help="YAML file of arguments; the command line wins over it.")
    config, given = _take_config(list(words))
    config = default if config is None else config
    known = [name for action in parser._actions for name in action.option_strings]
    if config is not None:
        given = [*_yaml_words(config, known), *given]
    try:
        *parsed, namespace, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # TrainingArguments refuses a combination
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"Unknown argument {unknown[0]}.{suggest(unknown[0], known)} See --help for every argument.")
    return list(parsed), dict(vars(namespace))


def _take_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config X` or `--config=X` out of the command line."""
    rest: list[str] = []
    found, i = None, 0
    while i < len(words):
        if words[i] == "--config":
            if i + 1 == len(words):
                raise UserError("--config needs the path of a YAML file; nothing follows it.")
            found, i = Path(words[i + 1]), i + 2
        elif words[i].startswith("--config="):
            found, i = Path(words[i].removeprefix("--config=")), i + 1
        else:
            rest, i = [*rest, words[i]], i + 1
    return found, rest


def _yaml_words(path: Path, known: Sequence[str]) -> list[str]:
    """A YAML file as command-line words, so that both are read and checked by the same parser."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}. Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must hold 'argument: value' lines; it holds {type(settings).__name__}.")
    words = []
    for key, value in settings.items():
        if f"--{key}" not in known or key in ("config", "help"):
            raise UserError(f"--config {path}: unknown key '{key}'.{suggest(f'--{key}', known)} Correct or remove it.")
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def suggest(name: str, known: Sequence[str]) -> str:
    """A sentence with the nearest known name, or nothing."""
    close = difflib.get_close_matches(name.split("=")[0], known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_values(arguments: Arguments) -> None:
    for name, value in (
        ("max_length", arguments.data.max_length),
        ("max_new_tokens", arguments.data.max_new_tokens),
        ("max_train_samples", arguments.data.max_train_samples),
        ("max_eval_samples", arguments.data.max_eval_samples),
        ("r", arguments.adapter.r),
        ("base_max_steps", arguments.quickstart.base_max_steps),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if arguments.push_to_hub and arguments.adapter.peft == "none":
        raise UserError("--push_to_hub true with --peft none has nothing to push: choose perft, lora or full.")
    if arguments.data.dataset_name == "reasoning" and not arguments.data.data_dir:
        raise UserError(
            "--dataset_name reasoning reads files by path: give --data_dir, the folder of boolq_train.jsonl.gz, "
            "boolq_test.jsonl.gz, ARC-Easy_train.jsonl.gz and ARC-Easy_test.jsonl.gz."
        )


def find_idle_settings(arguments: Arguments) -> list[str]:
    """Sentences about settings that were given and do nothing here."""
    adapter, idle = arguments.adapter, []
    used = {
        "perft": {f.name for f in dataclasses.fields(adapter)} - {"lora_target_parameters"},
        "lora": {"r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"},
    }.get(adapter.peft, set())
    for f in dataclasses.fields(adapter):
        if f.name not in used | {"peft"} and getattr(adapter, f.name) != f.default:
            idle.append(f"--{f.name} has no effect with --peft {adapter.peft}.")
    routed = adapter.variant == "R" or adapter.base_router != "frozen"
    if adapter.router_learning_rate is not None and adapter.peft == "perft" and not routed:
        idle.append(f"--router_learning_rate has no effect with --variant {adapter.variant}, which has no own router.")
    if adapter.expert_fraction is not None and adapter.peft == "perft" and adapter.variant != "E":
        idle.append(f"--expert_fraction has no effect with --variant {adapter.variant}; it belongs to E.")
    if arguments.model.model_name_or_path != QUICKSTART_MODEL:
        for f in dataclasses.fields(arguments.quickstart):
            if getattr(arguments.quickstart, f.name) != f.default and f.name != "base_source_dir":
                idle.append(f"--{f.name} has no effect: the model is {arguments.model.model_name_or_path}.")
    if arguments.data.data_dir and arguments.data.dataset_name != "reasoning":
        idle.append("--data_dir has no effect: it belongs to --dataset_name reasoning.")
    return idle
