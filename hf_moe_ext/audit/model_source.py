"""A model and an adapter from folders or the Hub: safetensors only, no code of theirs is run, and whole or not at all."""

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from hf_moe_ext.audit.inspection import ModelFacts
from hf_moe_ext.host.blocks import explain_no_blocks, iterate_experts

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# Of a configuration: what is about the file, not about the model.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
_SHOWN = 4


def load_model(name: str, adapter: str | None = None, device: str | None = None) -> tuple[Any, Any, ModelFacts]:
    """The model with its adapter in evaluation mode, its tokenizer, and what they are.

    Args:
        name: folder or Hub id of the base model.
        adapter: folder or Hub id of a PEFT adapter.
        device: for the model; None: the GPU, where there is one.

    Raises:
        ValueError: one of them cannot be read, has no MoE block, or does not belong to the others.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = None if adapter is None else _adapter_folder(adapter)
    _check_folder(name)
    tokenizer = _load_tokenizer(name)
    model = _load_base(name)
    if next(iterate_experts(model), None) is None:
        raise ValueError(f"{explain_no_blocks(model)}; hf-moe inspect needs a Mixture-of-Experts model")
    _check_vocabulary(tokenizer, model, name)
    facts = {
        "name": name,
        "model_type": str(model.config.model_type),
        "config_hash": _hash_config(model.config.to_dict()),
        "tokenizer_hash": _hash(sorted(tokenizer.get_vocab().items())),
    }
    if folder is not None and adapter is not None:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        _tell_other_base(settings, name)
        model = _attach(model, folder, adapter, name)
        facts |= {"adapter": adapter, "adapter_hash": _hash(settings)}
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {_first_line(error)}") from error
    return model.eval(), tokenizer, ModelFacts(**facts)


def _check_folder(name: str) -> None:
    """Say what a folder is that holds no model."""
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        what = "an adapter; name its base model first, and the folder with --adapter" if (
            (folder / CONFIG_FILE).is_file()
        ) else "no model: it has no config.json"  # fmt: skip
        raise ValueError(f"{name} is {what}")


def _load_base(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # What it returns depends on output_loading_info, which its annotations do not say.
        found: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"the model {name!r} cannot be loaded: {_first_line(error)}") from error
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"the weights of {name!r} lack {len(missing)} tensors, which would be random: {_list(missing)}; "
            "download the model again, or correct its config.json"
        )
    return model


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded ({_first_line(error)}); save the model's own beside its weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no end-of-text token; set its eos_token and save it")
    return tokenizer


def _check_vocabulary(tokenizer: Any, model: Any, name: str) -> None:
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {name!r} gives ids up to {largest}, but the model embeds only {rows}; it is not this model's, "
            "put its own there"
        )


def _adapter_folder(adapter: str) -> Path:
    """The adapter's folder, fetched if it is on the Hub: two files and no pickle, which could run code when it is read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder = Path(adapter)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        except (OSError, ValueError, HFValidationError) as error:
            raise ValueError(
                f"--adapter {adapter} is neither a folder here nor an adapter that could be fetched from the Hub: "
                f"{_first_line(error)}"
            ) from error
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            below = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
            hint = f"; adapters lie in {', '.join(below[:_SHOWN])}" if below else ""
            raise ValueError(f"--adapter {adapter} has no {file}; only adapters saved as safetensors are read{hint}")
    return folder


def _tell_other_base(settings: dict[str, Any], name: str) -> None:
    """Shapes alone do not tell models of one family apart, and a folder may have been renamed: so no error."""
    base = str(settings.get("base_model_name_or_path") or "")
    if base and Path(base).name != Path(name).name:
        logger.warning("the adapter says that its base model is %s; it is inspected on %s", base, name)


def _attach(model: Any, folder: Path, adapter: str, name: str) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    wrong = f"--adapter {adapter} does not belong to {name}"
    with warnings.catch_warnings():
        # PEFT warns of tensors that the file lacks; they are counted below.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                stored = set(file.keys())
            wrapped = PeftModel.from_pretrained(model, str(folder))
        except SafetensorError as error:
            raise ValueError(f"--adapter {adapter}: {WEIGHTS_FILE} is not a whole safetensors file: {error}") from error
        except Exception as error:  # each of PEFT's tuners checks in its own way
            raise ValueError(f"{wrong}: {type(error).__name__}: {_first_line(error)}") from error
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if missing := sorted(expected - stored):
        raise ValueError(f"{wrong}: it lacks {len(missing)} tensors that this model needs: {_list(missing)}")
    own = set(wrapped.get_base_model().state_dict())
    extra = sorted(key for key in stored - expected if key.removeprefix("base_model.model.") not in own)
    if extra:
        raise ValueError(f"{wrong}: it has {len(extra)} tensors that this model has no place for: {_list(extra)}")
    return wrapped


def _hash_config(config: dict[str, Any]) -> str:
    return _hash({key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
