"""Tiny models quantised by the libraries that are installed; what cannot run here is skipped with its reason."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig, QuantoConfig, TorchAoConfig

from hf_moe_ext.host.quantization import stored_tensors
from support import zoo

# Whole groups of 32 in every linear layer; also for the group size of 64 that bitsandbytes has in 4 bit.
SIZES = {"hidden_size": 64, "intermediate_size": 64}
FAMILIES = ("olmoe", "mixtral")

# Run on a CPU; the Trainer accepts them.
ON_CPU = ("bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "quanto-int8", "quanto-int4")
# Part of the test extra: a missing one is a failure, not a skip.
REQUIRED = ("bitsandbytes", "torchao")
# Those that peft.prepare_model_for_kbit_training accepts; it casts quanto's packed tensors, which refuse.
PREPARABLE = ("bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8")

_LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum.quanto", "hqq": "hqq"}


def installed(kind: str) -> bool:
    """Whether the library of a kind is there."""
    try:
        importlib.import_module(_LIBRARIES[kind.partition("-")[0]])
    except ImportError:
        return False
    return True


def settings(kind: str) -> Any:
    """The quantisation configuration of a kind; skips where its library is missing."""
    library, _, width = kind.partition("-")
    if library not in REQUIRED and not installed(kind):
        pytest.skip(f"{kind}: {library} is not installed")
    if kind == "bitsandbytes-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if kind == "torchao-int8":
        return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    if kind == "torchao-int4":
        return TorchAoConfig(importlib.import_module("torchao.quantization").Int4WeightOnlyConfig(group_size=32))
    if library == "quanto":
        return QuantoConfig(weights=width)
    if kind == "hqq-4bit":
        return HqqConfig(nbits=4, group_size=32)
    raise ValueError(kind)


def save(folder: Any, family: str) -> None:
    """A bfloat16 model of the family in a folder."""
    zoo.build(family, dtype=torch.bfloat16, **SIZES).save_pretrained(folder)


def load(folder: Any, kind: str, **arguments: Any) -> Any:
    """The model of a folder, freshly quantised."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(kind), **arguments)


def contents(model: nn.Module) -> dict[str, list[Tensor]]:
    """Every stored tensor of the base model, packed ones as they are packed, to compare bit for bit."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name.replace("base_layer.", ""): [part.detach().clone() for part in stored_tensors(tensor)]
        for name, tensor in named
        if "perft_" not in name
    }
