"""What a coordinate check is given: the configuration, the batch, the numbers; and what it refuses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from hf_moe_ext.mup.config_file import describe_error
from hf_moe_ext.mup.roles import NONE
from hf_moe_ext.mup.widening import change

SUPPORTED = ("mixtral_ext", "olmoe_ext")
_EXT_OF_STOCK = {"mixtral": "mixtral_ext", "olmoe": "olmoe_ext"}
_NUM_KINDS = 64  # of tokens in a drawn batch


def draw_tokens(vocab_size: int, num_sequences: int, sequence_length: int) -> Tensor:
    """A batch [rows, length], always the same: at most 64 kinds of tokens, the k-th as frequent as 1 / k.

    Of more kinds than a narrow model is wide, none gets a direction of its own, and what they share shrinks as the width
    grows: a slope of -1/2 that says nothing about the parametrisation. So a batch is like text rather than uniform.
    """
    for name, value, least in (("num_sequences", num_sequences, 1), ("sequence_length", sequence_length, 2)):
        _check_count(name, value, least)
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, min(vocab_size, _NUM_KINDS) + 1, dtype=torch.float64)
    ids = torch.multinomial(frequencies, num_sequences * sequence_length, replacement=True, generator=generator)
    return ids.reshape(num_sequences, sequence_length)


def parse_numbers(name: str, text: str) -> list[int]:
    """Numbers with commas between them; an error names the option."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{name}: must be whole numbers with commas between them, as in 64,128; got {text!r}"
        ) from error


def prepare_config(config: Any) -> tuple[Any, tuple[str, ...]]:
    """The ``*_ext`` configuration to measure, and what the check cannot look at.

    Raises:
        TypeError: no configuration.
        ValueError: of a family that has no ``*_ext`` form.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be a configuration of Transformers, got {type(config).__name__}")
    if config.model_type in _EXT_OF_STOCK:
        ext = _EXT_OF_STOCK[config.model_type]
        settings = config.to_dict()
        for key in ("model_type", "architectures", "quantization_config"):
            settings.pop(key, None)
        note = (
            f"{config.model_type!r} is a stock family: measured is {ext!r} with default keys, which is the same model in "
            "standard parametrisation with freshly drawn weights, the same learning rate for all of them; the bars are "
            f"µP's, so expect them to fail. Not checked: a checkpoint's own weights. For µP write model_type={ext!r}, "
            "mup='mup' and mup_base_hidden_size"
        )
        return AutoConfig.for_model(ext, **settings), (note,)
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"config: the coordinate check widens Mixture-of-Experts models of the families {', '.join(SUPPORTED)} (and "
            f"{', '.join(_EXT_OF_STOCK)}, in standard parametrisation); got model_type {config.model_type!r}; write the "
            "model as one of these, or check its own code with another tool"
        )
    # A quantised checkpoint's configuration would quantise weights that are about to be trained.
    config = change(config, {"quantization_config": None}) if getattr(config, "quantization_config", None) else config
    if config.mup == NONE:
        return config, ("mup='none': measured is the standard parametrisation; the bars are µP's",)
    return config, ()


def check_arguments(
    config: Any, widths: Sequence[int], num_steps: int, seeds: Sequence[int], lr: float, hold_latent: bool
) -> None:
    """Refuse what cannot be run; see ``check_coordinates``."""
    for name, values, least in (("widths", widths, 1), ("seeds", seeds, 0)):
        for value in values:
            _check_count(name, value, least)
        if len(set(values)) != len(values) or len(values) < (2 if name == "widths" else 1):
            needed = "at least two different sizes" if name == "widths" else "one or more different numbers"
            raise ValueError(f"{name}: must be {needed}, each once; got {list(values)}")
    _check_count("num_steps", num_steps, 1)
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: must be above 0; got {lr!r}")
    if hold_latent and config.moe_latent_size is None:
        raise ValueError(
            "hold_latent: no layer has a latent to hold (moe_block='standard'); leave it out, or write moe_block='dcca'"
        )
    if hold_latent and config.mup != NONE and config.mup_base_latent_size != config.moe_latent_size:
        raise ValueError(
            f"hold_latent: the base model's latent must be the one that is held; got moe_latent_size="
            f"{config.moe_latent_size} and mup_base_latent_size={config.mup_base_latent_size}; write both the same"
        )


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this build of PyTorch cannot calculate on.

    Raises:
        ValueError: with PyTorch's own reason.
    """
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # AssertionError, RuntimeError, ImportError, by the device
        raise ValueError(
            f"device: PyTorch must be able to calculate on it, got {str(device)!r} ({describe_error(error)}); choose cpu or "
            "another one that `hf-moe env` lists"
        ) from error


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse what is no batch of ids."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2 or not tokens.numel():
        raise ValueError(
            f"tokens: must be ids [rows, length] of at least two tokens a row; got {tokens.dtype} of shape {list(tokens.shape)}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"tokens: ids must be from 0 to vocab_size - 1 = {vocab_size - 1}; got {int(tokens.min())} to {int(tokens.max())}"
        )
