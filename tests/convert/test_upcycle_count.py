"""Parameters and bytes that upcycle reports: those of the written file, and those of the paper's formulas."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe_ext.convert import upcycle
from hf_moe_ext.scaling.ders_accounting import (
    DersGeometry,
    low_rank_parameters,
    quantized_parameters,
    sparse_parameters,
    vanilla_parameters,
)
from support.dense_models import save_dense

EXPERTS = 5
FORMS: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 3},
    "sparse": {"delta": "sparse", "drop_rate": 0.75},
    "quantized": {"delta": "quantized", "bits": 4},
    "vanilla": {"form": "vanilla"},
}


def count_by_formula(form: str, geometry: DersGeometry, extended: bool) -> float:
    if form == "low_rank":
        return low_rank_parameters(geometry, EXPERTS, 3, extended)
    if form == "sparse":
        return sparse_parameters(geometry, EXPERTS, 0.75, extended)
    if form == "quantized":
        return quantized_parameters(geometry, EXPERTS, 4, extended)
    return vanilla_parameters(geometry, EXPERTS)


def list_cases() -> list[tuple[str, str, str, str]]:
    """All that a form can hold: full copies have neither biases nor a universal expert."""
    cases = itertools.product(("llama-biased", "qwen3"), FORMS, ("none", "keep", "extend"), ("all", "1-2"))
    return [case for case in cases if case[1] != "vanilla" or (case[0] == "qwen3" and case[2] == "none")]


@pytest.mark.parametrize(("parent", "form", "universal", "layers"), list_cases())
def test_counts(tmp_path: Path, parent: str, form: str, universal: Any, layers: str) -> None:
    """Of the report, of the model that opens, of the file and of the paper's accounting."""
    dense = save_dense(tmp_path / "dense", parent)
    settings = {"num_experts": EXPERTS, "universal": universal, "layers": layers, **FORMS[form]}
    planned = upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=True, **settings)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", verify=False, **settings)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert report.num_parameters == sum(p.numel() for p in moe.parameters())
    assert report.num_parameters_before == sum(p.numel() for p in dense.parameters())
    assert sum(report.added_parameters.values()) == report.num_parameters - report.num_parameters_before
    assert sum(layer.added_parameters for layer in report.layers) == sum(report.added_parameters.values())
    assert report.num_bytes == planned.num_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert sum(report.added_bytes.values()) == report.num_bytes - report.num_bytes_before
    assert planned.as_dict() | {"written": True, "seconds": report.seconds} == report.as_dict()

    num_layers = 3 if layers == "all" else 2
    geometry = DersGeometry(32, 40, num_layers, 3, ffn_bias=False)
    # Llama's FFN has three biases, where the paper's two matrices have two.
    members = EXPERTS + (universal == "extend")
    biases = (members - 1) * (2 * 40 + 32) * num_layers * (parent == "llama-biased")
    wanted = count_by_formula(form, geometry, universal == "extend") + biases
    if universal == "keep":
        wanted += geometry.universal_parameters + biases / (members - 1)
    found: float = report.num_parameters - report.num_parameters_before
    if form == "quantized":  # codes are no parameters; 4 bits are a quarter of the paper's 16
        codes = sum(t.numel() for name, t in stored.items() if name.endswith("_codes"))
        found += codes / 2
    # round((1 - p) S) in each matrix; here exact.
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "universal"), [("low_rank", "none"), ("low_rank", "keep"), ("low_rank", "extend"), ("vanilla", "none")]
)
def test_active_parameters(tmp_path: Path, form: str, universal: Any) -> None:
    """All but the experts that a token is not sent to, counted in the file."""
    save_dense(tmp_path / "dense", "llama-biased" if form == "low_rank" else "mistral")
    settings = {"num_experts": EXPERTS, "top_k": 2, "universal": universal, **FORMS[form]}
    report = upcycle(tmp_path / "dense", tmp_path / "moe", verify=False, **settings)
    members = EXPERTS + (universal == "extend")
    idle = 0.0
    for name, tensor in load_file(tmp_path / "moe" / "model.safetensors").items():
        if "delta_" in name or name.endswith("_bias"):
            idle += tensor.numel() * (EXPERTS - 2) / members
        elif re.search(r"experts\.\d+\.", name):
            idle += tensor.numel() * (EXPERTS - 2) / EXPERTS
    assert idle > 0
    assert report.num_active_parameters == report.num_parameters - round(idle)


@pytest.mark.parametrize("universal", ["none", "keep", "extend"])
def test_bytes_of_full_copies(tmp_path: Path, universal: Any) -> None:
    """What base and deltas are compared with is what full copies take."""
    save_dense(tmp_path / "dense", "qwen3")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=True, universal=universal)
    vanilla = upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=True, form="vanilla")
    ffn = 3 * math.prod((32, 40)) * 3 * 4
    assert vanilla.num_bytes == vanilla.vanilla_bytes == report.vanilla_bytes - (universal != "none") * ffn
