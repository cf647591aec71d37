"""A tiny dense model on disk, and Mixtures of Experts made of it as sparse upcycling and training make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from support import zoo
from support.words import build_tokenizer
from support.zoo import VOCAB_SIZE

NUM_EXPERTS = 4
COMMON: dict[str, Any] = {**zoo.COMMON, "num_hidden_layers": 2}
_QWEN = {"head_dim": 8}
PARENTS: dict[str, Any] = {
    "mixtral": (LlamaForCausalLM, LlamaConfig, {}),
    "olmoe": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3_moe": (Qwen3ForCausalLM, Qwen3Config, _QWEN),
}
MOES: dict[str, Any] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_QWEN, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}


def save_dense(folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """The dense parent of a family, on disk with a tokenizer."""
    model_class, config_class, own = PARENTS[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**COMMON, **own, **keys})).to(dtype).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def upcycle_by_hand(
    dense: Any, family: str = "mixtral", scale: float = 0.03, rank: int | None = None, seed: int = 1, **keys: Any
) -> Any:
    """Experts that are the dense model's FFN plus a random delta, everything else shared with it, a random router.

    Args:
        dense: of ``save_dense``.
        family: key of ``MOES``.
        scale: ||delta|| over ||matrix||.
        rank: of the deltas; None: full.
        seed: of router and deltas.
        keys: of the configuration, beside those of the tests' models.
    """
    model_class, config_class, own = MOES[family]
    torch.manual_seed(seed)
    dtype = next(dense.parameters()).dtype
    model = model_class(config_class(**{**COMMON, **own, **keys})).to(dtype).eval()
    shared = {k: v for k, v in dense.state_dict().items() if k in model.state_dict() and ".mlp." not in k}
    shared = {k: v for k, v in shared.items() if v.shape == model.state_dict()[k].shape}
    model.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for layer, parent in zip(model.model.layers, dense.model.layers, strict=True):
            experts, ffn = layer.mlp.experts, parent.mlp
            for expert in range(len(experts.down_proj)):
                parts = [
                    _near(w, scale, rank) for w in (ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight)
                ]
                experts.gate_up_proj[expert] = torch.cat(parts[:2])
                experts.down_proj[expert] = parts[2]
    return model


def _near(matrix: Tensor, scale: float, rank: int | None) -> Tensor:
    rows, cols = matrix.shape
    noise = torch.randn(rows, cols) if rank is None else torch.randn(rows, rank) @ torch.randn(rank, cols)
    delta = noise * (scale * matrix.float().norm() / noise.norm())
    return (matrix.float() + delta).to(matrix.dtype)


def save_pair(
    folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32, shard: str = "5GB", **keys: Any
) -> tuple[Any, Any]:
    """Dense parent in ``folder / "dense"`` and its MoE in ``folder / "moe"``, with tokenizers; both models."""
    dense = save_dense(folder / "dense", family, dtype)
    moe = upcycle_by_hand(dense, family, **keys)
    moe.save_pretrained(folder / "moe", max_shard_size=shard)
    build_tokenizer().save_pretrained(folder / "moe")
    return dense, moe


def token_ids(seed: int = 2) -> Tensor:
    """[4, 24]."""
    return torch.randint(3, VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of ``token_ids``, in eval mode."""
    return model.eval()(input_ids=token_ids()).logits


def load(folder: Path) -> Any:
    """The model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder)


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| over ||wanted||."""
    return float((found - wanted).norm() / wanted.norm())
