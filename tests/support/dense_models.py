"""Tiny random dense models, each with the keys that a conversion could lose."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from support.words import build_tokenizer
from support.zoo import VOCAB_SIZE

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    # Logits of the order of 1: at 2 the rounding of float32 sums alone reaches 1e-6.
    "initializer_range": 0.07,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
PARENTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-biased": {"model_type": "llama", "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "granite": {
        **{"model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "head_dim": None},
        **{"residual_multiplier": 0.4, "logits_scaling": 2.0, "mlp_bias": True},
    },
    "qwen3": {
        **{"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
        **{"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    },
}


def make_dense_config(parent: str = "llama", **keys: Any) -> Any:
    """A configuration of ``PARENTS``, or of any model type, with other keys."""
    settings = {**_COMMON, **PARENTS.get(parent, {"model_type": parent}), **keys}
    given = {name: value for name, value in settings.items() if value is not None}  # a key that the class has not
    return AutoConfig.for_model(given.pop("model_type"), **given)


def save_dense(
    folder: Path, parent: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **keys: Any
) -> Any:
    """A random model with gains and biases that are not all alike, on disk with a tokenizer; returns it in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(make_dense_config(parent, **keys), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return model.eval()


def make_ids() -> Tensor:
    """[4, 24] token ids, no special ones."""
    return torch.randint(3, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def read_logits(model: Any) -> Tensor:
    """Of `make_ids`, in eval mode."""
    return model.eval()(input_ids=make_ids()).logits


def load_logits(folder: Path, **arguments: Any) -> Tensor:
    """Of the model in a folder."""
    return read_logits(AutoModelForCausalLM.from_pretrained(folder, **arguments))


def check_equal(found: Tensor, wanted: Tensor) -> None:
    """Logits of the order of 1, equal to 1e-6."""
    assert 0.1 < wanted.abs().max() < 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as stored."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
