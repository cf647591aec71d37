"""The doctor on saved adapters: what it calls wrong does not load, or does nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_moe_ext.perft.doctor import diagnose
from support import zoo
from support.doctor import adapter_folder, base_folder, codes, only, rewrite, set_config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "E"},
        {"variant": "D"},
        {"variant": "S"},
        {"task_type": "CAUSAL_LM"},
        {"variant": "E", "expert_ids": [1, 4], "base_router": "train"},
        {"shared_A": True, "base_router": "lora", "router_aux_loss_scope": "global"},
    ],
)
def test_a_good_adapter_is_well(settings: dict[str, Any], tmp_path: Path) -> None:
    diagnosis = diagnose(str(adapter_folder(tmp_path, **settings)))
    assert diagnosis.findings == []
    assert diagnosis.base is not None
    assert diagnosis.base.model_class == "OlmoeForCausalLM"
    assert diagnosis.adapter_parameters > 0
    json.dumps(diagnosis.as_dict())


@pytest.mark.parametrize("settings", [{}, {"shared_A": True, "base_router": "lora"}, {"base_router": "train"}])
def test_without_its_base_an_adapter_is_read_from_its_file_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, modules_to_save=["lm_head"], **settings)
    whole = diagnose(str(adapter))
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    alone = diagnose(str(adapter))
    assert "--base-model" in only(alone, "warning", "base-not-found")
    assert sorted(alone.rows, key=lambda row: row.module) == sorted(whole.rows, key=lambda row: row.module)
    assert alone.also_trains == whole.also_trains == {"lm_head.weight": (zoo.VOCAB_SIZE, 32)}
    assert diagnose(str(adapter), base_model=str(tmp_path / "elsewhere")).findings == []


def test_tensors_that_do_not_fit_are_named_and_do_not_load(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    name = "base_model.model.model.layers.0.mlp.experts.perft"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{name}_A")
        tensors[f"{name}_C"] = torch.zeros(2)
        tensors[f"{name}_B"] = tensors[f"{name}_B"][:, :, :2].contiguous()

    rewrite(adapter, spoil)
    diagnosis = diagnose(str(adapter))
    assert codes(diagnosis) == [("error", f"{kind}-tensors") for kind in ("missing", "extra", "misshaped")]
    missing, extra, shape = diagnosis.findings
    assert (missing.tensors, extra.tensors, shape.tensors) == ((f"{name}_A",), (f"{name}_C",), (f"{name}_B",))
    assert "is [4, 32, 2], needed [4, 32, 4]" in shape.message
    assert diagnosis.rows[0].tensors["perft_B"] == (4, 32, 2)  # what the file holds
    with pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)


def test_an_adapter_on_another_base_model_does_not_fit(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    other = diagnose(str(adapter), base_model=str(base_folder(tmp_path / "wider", hidden_size=64)))
    assert codes(other) == [("error", "misshaped-tensors")]
    assert len(other.findings[0].tensors) == 6
    assert "and 2 more" in other.findings[0].message
    dense = diagnose(str(adapter), base_model=str(base_folder(tmp_path / "dense", "llama")))
    assert codes(dense) == [("error", "no-moe-block")]


def test_a_resized_embedding_in_the_file_is_a_warning(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    name = "base_model.model.model.embed_tokens.weight"
    rewrite(adapter, lambda tensors: tensors.update({name: torch.ones(zoo.VOCAB_SIZE + 1, 32)}))
    assert f"resize_token_embeddings({zoo.VOCAB_SIZE + 1})" in only(
        diagnose(str(adapter)), "warning", "resized-vocabulary"
    )


def test_a_classifier_of_another_size_is_the_adapters_own(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path, "mixtral")
    name = "base_model.model.score.weight"
    set_config(adapter, task_type="SEQ_CLS", auto_mapping=None)
    rewrite(adapter, lambda tensors: tensors.update({name: torch.ones(5, 32)}))
    diagnosis = diagnose(str(adapter))
    assert diagnosis.findings == []
    assert diagnosis.also_trains == {"score.weight": (5, 32)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    name = "base_model.model.model.layers.1.mlp.experts.perft_A"
    rewrite(adapter, lambda tensors: tensors[name][0, 0].fill_(value))
    assert f"NaN or infinity in 1 tensor: {name}" in only(diagnose(str(adapter)), "error", "not-finite")


def test_an_adapter_that_never_trained_is_wrong_and_one_idle_layer_a_warning(tmp_path: Path) -> None:
    fresh = adapter_folder(tmp_path, init_weights=True)
    assert "never trained and changes nothing" in only(diagnose(str(fresh)), "error", "never-trained")
    name = "base_model.model.model.layers.0.mlp.experts.perft_B"
    rewrite(fresh, lambda tensors: tensors[name].fill_(1.0))
    assert "in 1 of 2 modules" in only(diagnose(str(fresh)), "warning", "partly-untrained")


def test_an_adapter_of_a_newer_version_warns(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    set_config(adapter, hf_moe_ext_version="9.0.0")
    assert "9.0.0, newer than the installed" in only(diagnose(str(adapter)), "warning", "adapter-config-warning")
    set_config(adapter, a_setting_of_the_future=1)
    assert codes(diagnose(str(adapter))) == [("warning", "adapter-config-warning")] * 2


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert "is a pickle, which can run code" in only(diagnose(str(adapter)), "error", "pickle-adapter")


def test_broken_adapter_folders_are_one_message(tmp_path: Path) -> None:
    adapter = adapter_folder(tmp_path)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-100])
    assert "not a whole safetensors file" in only(diagnose(str(adapter)), "error", "weights-unreadable")
    (adapter / "adapter_model.safetensors").unlink()
    assert "are missing" in only(diagnose(str(adapter)), "error", "no-weights")
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    set_config(adapter, top_k=9)
    assert "top_k must be between" in only(diagnose(str(adapter)), "error", "adapter-config-refused")
    (adapter / "adapter_config.json").write_text("[]")
    only(diagnose(str(adapter)), "error", "adapter-config-unreadable")
    LoraConfig().save_pretrained(adapter)
    assert "of type LORA, not PERFT" in only(diagnose(str(adapter)), "error", "not-perft")
