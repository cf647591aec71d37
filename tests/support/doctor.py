"""Folders for the doctor to examine, and what it found in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_moe_ext import PerftConfig
from hf_moe_ext.perft.doctor import Diagnosis
from support import zoo


def base_folder(folder: Path, family: str = "olmoe", **overrides: Any) -> Path:
    """A model folder with nothing but its config.json."""
    {**zoo.FAMILIES, **zoo.REFUSED}[family](**overrides).save_pretrained(folder)
    return folder


def adapter_folder(folder: Path, family: str = "olmoe", **settings: Any) -> Path:
    """A trained-looking adapter in folder/adapter and its base model in folder/base."""
    zoo.build(family).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, PerftConfig(**{"init_weights": False, "r": 4, **settings})).save_pretrained(
        folder / "adapter"
    )
    return folder / "adapter"


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def set_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def codes(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(finding.level, finding.code) for finding in diagnosis.findings]


def only(diagnosis: Diagnosis, level: str, code: str) -> str:
    """The message and next step of the one finding there is."""
    assert codes(diagnosis) == [(level, code)]
    assert diagnosis.ok == (level == "warning")
    return f"{diagnosis.findings[0].message} | {diagnosis.findings[0].next_step}"
