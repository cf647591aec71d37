"""Reads a model's configuration so that whatever is wrong in its file is one error with one line."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# Something is divided by each of them.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "head_dim",
    "vocab_size",
)


def read_config(source: Any, name: Any = None) -> Any:
    """A configuration by Hub id, folder or file.

    Args:
        source: where it is.
        name: what the user called it; None: ``source``.

    Raises:
        ValueError: there is none that Transformers knows, or a key of it is refused.
    """
    shown = str(source if name is None else name)
    try:
        # First the keys alone: a class may divide by a size before it looks at it.
        check_sizes(PreTrainedConfig.get_config_dict(source)[0])
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # Transformers checks the kinds of some keys with errors of its own
        raise ValueError(
            f"the configuration of {shown!r} cannot be read: {describe_error(error)}; correct it, or pass a Hub id, a folder "
            "or a config.json that Transformers knows"
        ) from error


def check_sizes(keys: Mapping[str, Any]) -> None:
    """Refuse sizes below one; kinds are left to Transformers.

    Raises:
        ValueError: naming the key.
    """
    for name in _SIZES:
        value = keys.get(name)
        if isinstance(value, int | float) and not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")


def describe_error(error: Exception) -> str:
    """An error in one line, with its kind where the text alone does not tell what is wrong."""
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, OSError | ValueError | TypeError)
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")
