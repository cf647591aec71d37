"""The arguments of `pretrain.py`: every key of the model's configuration is one, beside the data's and the Trainer's."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune_arguments import (
    FinetuneTrainingArguments,
    LayoutArguments,
    RecipeParser,
    SourceArguments,
    UserError,
    read_words,
    suggest,
)
from hf_moe_ext import MixtralExtConfig, OlmoeExtConfig, Qwen3MoeExtConfig

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "pretrain_dcca.yaml"
CONFIG_CLASSES: dict[str, Any] = {
    "olmoe_ext": OlmoeExtConfig,
    "mixtral_ext": MixtralExtConfig,
    "qwen3_moe_ext": Qwen3MoeExtConfig,
}
SOURCE, TRAINED = "source", "trained"
# Written into every config.json by Transformers; they say nothing about the model.
_BOOKKEEPING = ("transformers_version", "architectures", "dtype", "torch_dtype")
_PREFIX = "config:"


@dataclass
class PretrainModelArguments(LayoutArguments):
    """Which model is made. Every key of its configuration is a flag of its own, see the end of this list."""

    model_type: Literal["olmoe_ext", "mixtral_ext", "qwen3_moe_ext"] = field(
        default="olmoe_ext", metadata={"help": "Family of the model."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "JSON or YAML file of configuration keys; flags win over it."}
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Type the weights are held in."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "grouped_mm, batched_mm, eager ...; Transformers chooses when left out."}
    )


@dataclass
class PretrainDataArguments(SourceArguments):
    """Which text it reads; rows are packed: blocks of `--max_length` tokens that overlap by one."""

    dataset_name: str = field(
        default=SOURCE,
        metadata={
            "help": "'source' is the text of this Python's standard library; else a data set of the Hub, a folder or a "
            "json/jsonl/csv/tsv/parquet/txt file (also .gz) with the columns finetune.py reads."
        },
    )
    source_dir: str | None = field(
        default=None, metadata={"help": "Folder of Python files in place of the standard library, for 'source'."}
    )
    tokenizer_name_or_path: str = field(
        default=TRAINED,
        metadata={"help": "Tokenizer of the Hub or folder; 'trained': byte-level BPE of the train text."},
    )
    tokenizer_vocab_size: int = field(
        default=4096, metadata={"help": "Entries of a trained tokenizer, the two special ones included."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where a trained tokenizer is kept; the parent of --output_dir."}
    )
    max_curve_samples: int | None = field(
        default=None, metadata={"help": "Held-out rows that --eval_strategy measures; all of them when left out."}
    )
    ngram_baseline: bool = field(
        default=True, metadata={"help": "Measure an order-3 byte n-gram of the train text on the held-out text too."}
    )


@dataclass
class PretrainTrainingArguments(FinetuneTrainingArguments):
    """Trainer's own arguments, and whether an output folder may be used again."""

    output_dir: str | None = field(default="outputs/pretrain", metadata={"help": "Folder that gets everything."})


@dataclass(frozen=True)
class PretrainArguments:
    """All of them, checked; `config_keys` is what the model's configuration is made of."""

    model: PretrainModelArguments
    data: PretrainDataArguments
    training: PretrainTrainingArguments
    config_keys: dict[str, Any]
    push_to_hub: bool

    @property
    def output_dir(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))

    def describe(self) -> dict[str, Any]:
        """What makes a run this run and no other: what is trained on what, not how long or where."""
        layout = [f.name for f in dataclasses.fields(LayoutArguments)]
        elsewhere = [*layout, "model_config"]
        unread = ("cache_dir", "max_eval_samples", "max_curve_samples", "ngram_baseline")
        model, data = dataclasses.asdict(self.model), dataclasses.asdict(self.data)
        return {
            **{name: value for name, value in model.items() if name not in elsewhere},
            **{name: value for name, value in data.items() if name not in unread},
            "config": self.config_keys,
            "seed": self.training.seed,
            "learning_rate": self.training.learning_rate,
        }


def parse_pretrain_arguments(argv: Sequence[str] | None = None) -> PretrainArguments:
    """Read the command line and, under it, the YAML file of `--config`.

    Without `--config` and without `--model_config`, `configs/pretrain_dcca.yaml` is the file.

    Raises:
        UserError: An unknown or meaningless argument or key.
    """
    kinds: list[Any] = [PretrainModelArguments, PretrainDataArguments, PretrainTrainingArguments]
    parser = RecipeParser(kinds, prog="pretrain.py", allow_abbrev=False, description=__doc__)
    _add_config_keys(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    complete = any(word.split("=")[0] == "--model_config" for word in given)
    (model, data, training), extra = read_words(parser, given, None if complete else DEFAULT_CONFIG)
    flags = {
        name.removeprefix(_PREFIX): _read_value(words) for name, words in extra.items() if name.startswith(_PREFIX)
    }
    from_file = {} if model.model_config is None else read_config_file(Path(model.model_config))
    in_file = from_file.pop("model_type", model.model_type)
    if in_file != model.model_type and any(word.split("=")[0] == "--model_type" for word in given):
        raise UserError(
            f"--model_type {model.model_type} and --model_config {model.model_config}, which is of model_type {in_file}, "
            "contradict each other: leave one out."
        )
    model.model_type = in_file
    keys = {**from_file, **flags}
    _check_keys(keys, model.model_type, model.model_config)
    arguments = PretrainArguments(model, data, training, keys, training.push_to_hub)
    training.push_to_hub = False  # Trainer would push after every save; the finished folder is pushed once, at the end
    for name in ("max_length", "max_train_samples", "max_eval_samples", "max_curve_samples", "tokenizer_vocab_size"):
        least, value = {"max_length": 2, "tokenizer_vocab_size": 258}.get(name, 1), getattr(data, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}.")
    return arguments


def list_config_keys(model_type: str) -> list[str]:
    """Names that the configuration class takes."""
    kind = CONFIG_CLASSES[model_type]
    names = {f.name for f in dataclasses.fields(kind) if f.init} | set(kind.attribute_map)
    return sorted(names - set(_BOOKKEEPING))


def read_config_file(path: Path) -> dict[str, Any]:
    """Configuration keys of a JSON or YAML file (YAML reads both), less Transformers' bookkeeping.

    Raises:
        UserError: It cannot be read, or is of another kind of model.
    """
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--model_config {path} cannot be read: {error.strerror}. Give a JSON or YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--model_config {path} is neither JSON nor YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(keys, dict):
        raise UserError(f"--model_config {path} must hold keys and values; it holds {type(keys).__name__}.")
    keys = {str(name): _number(value) for name, value in keys.items() if name not in _BOOKKEEPING}
    if keys.get("model_type", "olmoe_ext") not in CONFIG_CLASSES:
        raise UserError(
            f"--model_config {path}: model_type must be {' or '.join(CONFIG_CLASSES)}, got {keys['model_type']!r}. The "
            "same keys make the stock model when moe_block is left out."
        )
    return keys


def _add_config_keys(parser: argparse.ArgumentParser) -> None:
    taken = {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    group = parser.add_argument_group("model configuration", "keys of the model's configuration, as in its config.json")
    for name in sorted({key for kind in CONFIG_CLASSES for key in list_config_keys(kind)} - taken):
        group.add_argument(f"--{name}", dest=f"{_PREFIX}{name}", nargs="+", default=argparse.SUPPRESS, help="")


def _read_value(words: Sequence[str]) -> Any:
    values = [_number(yaml.safe_load(word)) for word in words]
    return values[0] if len(values) == 1 else values


def _number(value: Any) -> Any:
    """`1e-5` is a number to JSON and to people, and a string to YAML 1.1."""
    if isinstance(value, str):
        try:
            number = json.loads(value)
        except ValueError:
            return value
        return number if isinstance(number, int | float) else value
    return value


def _check_keys(keys: Mapping[str, Any], model_type: str, file: str | None) -> None:
    known = list_config_keys(model_type)
    for name in keys:
        if name not in known:
            where = f"--model_config {file}: " if file is not None else ""
            close = suggest(name, known)
            raise UserError(f"{where}{model_type} has no configuration key '{name}'.{close} Correct or remove it.")
