"""What upcycle refuses before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_ext.convert import upcycle
from hf_moe_ext.convert.upcycle_plan import choose_layers
from support import zoo
from support.dense_models import make_dense_config, save_dense


def refuse(tmp_path: Path, words: str, error: type[Exception] = ValueError, **settings: Any) -> None:
    """It is refused, in a dry run too, and nothing is there afterwards."""
    before = sorted(path.name for path in tmp_path.iterdir())
    for dry_run in (False, True):
        with pytest.raises(error, match=words):
            upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=dry_run, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def save_config(folder: Path, parent: str, **keys: Any) -> None:
    """A folder with nothing but a configuration: refusals of the configuration need no weights."""
    make_dense_config(parent, **keys).save_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "words", "error"),
    [
        ({"form": "lora"}, "form must be one of 'ders', 'vanilla'; got 'lora'", ValueError),
        ({"delta": "svd"}, "delta must be one of 'low_rank', 'sparse', 'quantized'; got 'svd'", ValueError),
        ({"universal": "yes"}, "universal must be one of 'none', 'keep', 'extend'; got 'yes'", ValueError),
        ({"num_experts": 1}, "num_experts must be at least 2", ValueError),
        ({"num_experts": 2.0}, "num_experts must be an integer; got 2.0", TypeError),
        ({"top_k": 0}, "top_k must be from 1 to num_experts=8; got 0", ValueError),
        ({"top_k": 9}, "top_k must be from 1 to num_experts=8; got 9", ValueError),
        ({"top_k": True}, "top_k must be an integer; got True", TypeError),
        ({"rank": 0}, "rank must be at least 1", ValueError),
        ({"rank": 33}, "rank must be .* 32.* got 33", ValueError),
        ({"rank": 4.0}, "rank must be an integer; got 4.0", TypeError),
        ({"delta": "sparse", "drop_rate": 0.0}, "drop_rate must lie strictly between 0 and 1", ValueError),
        ({"delta": "sparse", "drop_rate": 1.0}, "drop_rate must lie strictly between 0 and 1", ValueError),
        ({"delta": "sparse", "drop_rate": 0.9999}, "keeps none of a matrix's 1280 entries", ValueError),
        ({"delta": "quantized", "bits": 3}, "bits must be one of 16, 8, 4, 2, 1; got 3", ValueError),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be True or False; got 1", TypeError),
        ({"router_std": -0.1}, "router_std must be at least 0 and finite; got -0.1", ValueError),
        ({"router_std": float("nan")}, "router_std must be at least 0 and finite; got nan", ValueError),
        ({"router_aux_loss_coef": "no"}, "router_aux_loss_coef must be a number; got 'no'", TypeError),
        ({"seed": -1}, "seed must be at least 0", ValueError),
        ({"seed": 0.5}, "seed must be an int", TypeError),
        (
            {"dtype": "int8"},
            "dtype must be one of float64, float32, bfloat16, float16, or None .* got 'int8'",
            ValueError,
        ),
        ({"layers": []}, "layers: none given; write 'all', 'every-other' or some of 0 to 2", ValueError),
        ({"layers": [3]}, "layers must be from 0 to 2; got 3", ValueError),
        ({"layers": "2-3"}, "layers must be from 0 to 2; got 3", ValueError),
        ({"layers": "odd"}, "layers must be numbers and ranges such as 3,5-8; got 'odd'", ValueError),
        ({"layers": [1, 1]}, "layers must not repeat", ValueError),
        ({"layers": [1.0]}, "layers must be integers, or text", TypeError),
        ({"universal": "extend", "norm_topk_prob": False}, "universal='extend' with norm_topk_prob=False", ValueError),
        (
            {"top_k": 1, "router_aux_loss_coef": 0},
            "nothing would ever train the router; write norm_topk_prob",
            ValueError,
        ),
        (
            {"top_k": 1, "router_aux_loss_coef": 0, "form": "vanilla"},
            "nothing would ever train the router; write norm_topk_prob",
            ValueError,
        ),
        ({"form": "vanilla", "universal": "keep"}, "a stock mixtral model has no expert that every token", ValueError),
        ({"form": "vanilla", "layers": "every-other"}, "every layer of a stock mixtral model has experts", ValueError),
        (
            {"form": "vanilla", "norm_topk_prob": False},
            "stock mixtral model always makes its gates sum to 1",
            ValueError,
        ),
    ],
)
def test_arguments(tmp_path: Path, settings: dict[str, Any], words: str, error: type[Exception]) -> None:
    save_config(tmp_path / "dense", "llama")
    refuse(tmp_path, words, error, **settings)


@pytest.mark.parametrize(
    ("parent", "keys", "settings", "words"),
    [
        (
            "llama",
            {"attention_bias": True},
            {},
            "attention_bias=True, and Mixtral's attention has no biases.* needed: ",
        ),
        ("llama", {"mlp_bias": True}, {"form": "vanilla"}, "mlp_bias=True.*no biases; write form='ders'"),
        # Which Transformers reads as Ministral.
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, {}, "alternate between windows"),
        (
            "qwen3",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
            {},
            r"its layers differ in their attention \(full_attention, sliding_attention, window 9\).* needed: ",
        ),
        ("granite", {"attention_bias": True}, {}, "attention_bias=True"),
        (
            "granite",
            {"mlp_bias": False},
            {"form": "vanilla"},
            "residual_multiplier=0.4, .* a stock mixtral .*no multipliers",
        ),
        ("qwen3", {}, {"form": "vanilla", "universal": "extend"}, "a stock qwen3_moe model has no expert that every"),
    ],
)
def test_keys_without_a_home(
    tmp_path: Path, parent: str, keys: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    if "layer_types" in keys:
        keys = {"num_hidden_layers": 4} | keys
    save_config(tmp_path / "dense", parent, **keys)
    refuse(tmp_path, words, **settings)


@pytest.mark.parametrize(
    ("parent", "words"),
    [
        ("qwen2", "q, k and v projections have biases"),
        ("olmo", "LayerNorm has no weights"),
        ("olmo2", "norms stand behind attention"),
        ("olmo3", "alternate between windows"),
        ("phi", "rotates a part of each head"),
        ("phi3", "one matrix each"),
        ("gemma", r"1 \+ weight"),
        ("gemma2", "soft cap"),
        ("gemma3_text", "before and behind"),
        ("stablelm", "LayerNorm with biases"),
        ("smollm3", "no rotary embedding"),
        ("ministral", "one for all"),
        ("cohere", "scaled logits"),
        ("starcoder2", "un-gated"),
        ("gpt2", "learned positions"),
        ("gpt_neox", "beside the FFN"),
        ("bloom", "no MoE family here is known"),
    ],
)
def test_families_without_a_home(tmp_path: Path, parent: str, words: str) -> None:
    """Each is a family that Transformers knows, and the reason says what would be needed."""
    AutoConfig.for_model(parent).save_pretrained(tmp_path / "dense")
    refuse(
        tmp_path,
        f"upcycle takes llama, mistral, granite, qwen3; .* has model_type '{parent}'.*no exact home: .*{words}",
    )
    if parent != "bloom":
        refuse(tmp_path, "needed: ")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_models_with_experts(tmp_path: Path, family: str) -> None:
    zoo.FAMILIES[family]().save_pretrained(tmp_path / "dense")
    refuse(tmp_path, f"model_type '{family}'.* has experts already.*hf-moe compress")


def test_quantised_sources(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    config, weights = tmp_path / "dense" / "config.json", tmp_path / "dense" / "model.safetensors"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"quantization_config": {"quant_method": "fp8"}}))
    refuse(tmp_path, "upcycle: .* is quantised .'fp8'")
    # Tensors that are, without a word in config.json.
    config.write_text(text)
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    for bad in (tensors[name].to(torch.int8), tensors[name].to(torch.float8_e4m3fn)):
        save_file(tensors | {name: bad}, weights, {"format": "pt"})
        refuse(tmp_path, f"{name} is stored as (I8|F8_E4M3), so it is quantised")
    save_file(tensors | {f"{name}.quant_state": torch.zeros(3)}, weights, {"format": "pt"})
    refuse(tmp_path, f"holds {name}.quant_state, which a llama model has no place for: it is quantised, or")


def test_adapters(tmp_path: Path) -> None:
    get_peft_model(save_dense(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "dense"
    )
    refuse(tmp_path, "holds an adapter, not a model.*then upcycle that")


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    refuse(tmp_path, "folder without config.json")
    save_config(tmp_path / "dense", "llama")
    refuse(tmp_path, "needs model.safetensors or .* found no weights", FileNotFoundError)
    (tmp_path / "dense" / "pytorch_model.bin").write_bytes(b"")
    refuse(tmp_path, "Pickled weights are never read", FileNotFoundError)


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", shard="20KB")
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, f"{shards[1].name} is not a readable safetensors file")
    shards[1].unlink()
    refuse(tmp_path, f"names {shards[1].name}, which is missing", FileNotFoundError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4}, "has no model.layers.3.* tensors are missing"),
        ({"num_hidden_layers": 2}, "holds model.layers.2"),
        ({"intermediate_size": 48}, r"(gate|up|down)_proj.weight is \(.*40.* its config.json says \(.*48"),
        ({"mlp_bias": True}, "has no model.layers.0.mlp.down_proj.bias"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
    ],
)
def test_checkpoints_that_are_not_their_config(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    save_dense(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuse(tmp_path, words)


def test_a_model_without_its_head(tmp_path: Path) -> None:
    save_dense(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").model.save_pretrained(tmp_path / "dense")
    refuse(tmp_path, "saved without its language-model head")


def test_choice_of_layers() -> None:
    assert choose_layers("all", 3) == [0, 1, 2]
    assert choose_layers("every-other", 5) == [0, 2, 4]
    assert choose_layers("0-2,4", 5) == [0, 1, 2, 4]
    assert choose_layers((3, 1), 5) == [1, 3]
