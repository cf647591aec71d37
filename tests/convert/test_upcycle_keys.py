"""Which keys of the parent an upcycled model has, and what it is warned of."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_ext.convert import upcycle
from support.dense_models import LLAMA3, save_dense

_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout", "sliding_window"),
)


@pytest.mark.parametrize("form", ["ders", "vanilla"])
@pytest.mark.parametrize("parent", ["llama", "mistral", "qwen3"])
def test_every_key_that_matters(tmp_path: Path, parent: str, form: Any) -> None:
    odd = {
        "attention_dropout": 0.1,
        "eos_token_id": [2, 5],
        "use_cache": False,
        "hidden_act": "gelu",
        "bos_token_id": 7,
    }
    odd |= {"rope_parameters": LLAMA3, "initializer_range": 0.07, "tie_word_embeddings": True, "pad_token_id": 4}
    dense = save_dense(tmp_path / "dense", parent, **odd).config
    upcycle(
        *(tmp_path / "dense", tmp_path / "moe"),
        form=form,
        num_experts=5,
        top_k=3,
        router_aux_loss_coef=0.3,
        verify=False,
    )
    moe = AutoConfig.from_pretrained(tmp_path / "moe")
    for key in _SAME:
        wanted = getattr(dense, key, None)
        assert getattr(moe, key) == wanted, key
    width = moe.moe_intermediate_size if parent == "qwen3" else moe.intermediate_size
    assert (width, moe.num_experts, moe.num_experts_per_tok) == (40, 5, 3)
    assert (moe.router_aux_loss_coef, moe.output_router_logits) == (0.3, True)
    assert getattr(moe, "attention_bias", False) == getattr(dense, "attention_bias", False)
    assert moe.architectures == [type(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")).__name__]
    assert moe.dtype == torch.float32


def test_windows(tmp_path: Path) -> None:
    """Llama has none, whatever its config.json says; Qwen3's is there and not used."""
    save_dense(tmp_path / "dense", "qwen3", use_sliding_window=False, max_window_layers=1)
    upcycle(tmp_path / "dense", tmp_path / "moe", verify=False)
    moe = AutoConfig.from_pretrained(tmp_path / "moe")
    assert (moe.use_sliding_window, moe.sliding_window) == (False, None)
    save_dense(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 5, "favourite": 1}))
    report = upcycle(tmp_path / "llama", tmp_path / "moe-llama")
    assert AutoConfig.from_pretrained(tmp_path / "moe-llama").sliding_window is None
    assert "config.json: llama has no favourite, sliding_window; not kept" in report.warnings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delta": "quantized"}, "codes have no gradient, so training moves the base and the router only"),
        ({"top_k": 1}, r"only the load-balance loss \(router_aux_loss_coef=0.01\) moves it.*universal='extend'"),
        ({"top_k": 1, "form": "vanilla"}, "only the load-balance loss"),
        ({"norm_topk_prob": False}, "each layer starts as their sum times the dense FFN"),
        ({"drop_rate": 0.5}, "drop_rate=0.5: no effect with delta='low_rank'"),
        ({"form": "vanilla", "rank": 2, "bits": 8}, "rank=2, bits=8: no effect with form='vanilla'"),
        ({"rank": 16}, r"rank=16: base and deltas take .* bytes, full copies .* only a rank below 15.56 saves any"),
        ({"delta": "sparse", "drop_rate": 0.1}, "only a drop_rate above 0.125 saves any"),
        ({"delta": "quantized", "bits": 16}, "bits=16: .* only fewer bits than 16 save any"),
    ],
)
def test_warnings(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    save_dense(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=True, **settings)
    assert any(re.search(words, text) for text in report.warnings), report.warnings
    assert words.split(" ")[0] in report.as_text()


@pytest.mark.parametrize("settings", [{}, {"form": "vanilla"}, {"delta": "sparse"}, {"top_k": 1, "universal": "keep"}])
def test_nothing_to_warn_of(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_dense(tmp_path / "dense", "qwen3")
    assert upcycle(tmp_path / "dense", tmp_path / "moe", dry_run=True, **settings).warnings == []
