"""A Mixtral checkpoint large enough to measure memory on, written without a model, and its dense parent."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from hf_moe_ext.convert.checkpoint import CheckpointWriter
from support.upcycled import COMMON, save_pair

HIDDEN, INNER, NUM_EXPERTS = 512, 1024, 32
_SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
_STOCK = {"gate": "w1", "up": "w3", "down": "w2"}


def save_big(folder: Path, num_layers: int) -> None:
    """bfloat16: a stack of experts is 32 MiB, a layer 96 MiB, in shards of 250 MB; a tiny pair in ``folder / "warm"``."""
    save_pair(folder / "warm")
    keys = {**COMMON, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": num_layers}
    keys["dtype"] = "bfloat16"
    for name in ("dense", "moe"):
        (folder / name).mkdir(parents=True)
    LlamaConfig(**keys, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "dense")
    moe = {**keys, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    MixtralConfig(**moe, architectures=["MixtralForCausalLM"]).save_pretrained(folder / "moe")
    torch.manual_seed(0)
    shard_bytes = 250_000_000
    with (
        CheckpointWriter(folder / "dense", shard_bytes) as dense,
        CheckpointWriter(folder / "moe", shard_bytes) as experts,
    ):
        experts.write("model.embed_tokens.weight", torch.randn(COMMON["vocab_size"], HIDDEN).bfloat16())
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            experts.write(f"{prefix}block_sparse_moe.gate.weight", torch.randn(NUM_EXPERTS, HIDDEN).bfloat16())
            experts.write(f"{prefix}post_attention_layernorm.weight", torch.ones(HIDDEN).bfloat16())
            for matrix, shape in _SHAPES.items():
                base = torch.randn(shape) * 0.02
                dense.write(f"{prefix}mlp.{matrix}_proj.weight", base.bfloat16())
                for expert in range(NUM_EXPERTS):
                    name = f"{prefix}block_sparse_moe.experts.{expert}.{_STOCK[matrix]}.weight"
                    experts.write(name, _near(base))


def _near(base: Tensor) -> Tensor:
    return (base + torch.randn(base.shape) * 0.001).bfloat16()
