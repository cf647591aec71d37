"""A Mixtral checkpoint large enough to measure memory on, written without a model, and its dense parent."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from hf_moe_ext.convert.checkpoint import CheckpointWriter
from support.upcycled import COMMON, save_pair

_STOCK = {"gate": "w1", "up": "w3", "down": "w2"}


def save_big(folder: Path, num_layers: int, num_experts: int, hidden: int, inner: int) -> None:
    """bfloat16, in shards of 250 MB: a stack of experts takes 2 num_experts hidden inner bytes; a tiny pair in ``folder / "warm"``."""
    save_pair(folder / "warm")
    keys = {**COMMON, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": num_layers}
    keys["dtype"] = "bfloat16"
    for name in ("dense", "moe"):
        (folder / name).mkdir(parents=True)
    LlamaConfig(**keys, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "dense")
    moe = {**keys, "num_local_experts": num_experts, "num_experts_per_tok": 2}
    config = MixtralConfig(**moe, architectures=["MixtralForCausalLM"])
    config.save_pretrained(folder / "moe")
    with torch.device("meta"):
        outline = MixtralForCausalLM(config).state_dict()
    torch.manual_seed(0)
    shard_bytes = 250_000_000
    with (
        CheckpointWriter(folder / "dense", shard_bytes) as dense,
        CheckpointWriter(folder / "moe", shard_bytes) as experts,
    ):
        for name, tensor in outline.items():
            if ".experts." not in name:
                stored = name.replace(".mlp.", ".block_sparse_moe.")
                experts.write(stored, torch.ones(tensor.shape, dtype=torch.bfloat16))
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            for matrix, stock_name in _STOCK.items():
                base = torch.randn((hidden, inner) if matrix == "down" else (inner, hidden)) * 0.02
                dense.write(f"{prefix}mlp.{matrix}_proj.weight", base.bfloat16())
                for expert in range(num_experts):
                    experts.write(f"{prefix}block_sparse_moe.experts.{expert}.{stock_name}.weight", _near(base))


def _near(base: Tensor) -> Tensor:
    return (base + torch.randn(base.shape) * 0.001).bfloat16()
