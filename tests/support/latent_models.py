"""Tiny ``*_ext`` models, and the DCCA block written out with loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_ext.models import MixtralExtConfig, OlmoeExtConfig, Qwen3MoeExtConfig
from support.naive import largest
from support.zoo import COMMON

FAMILIES: dict[str, Any] = {
    "olmoe_ext": OlmoeExtConfig,
    "mixtral_ext": MixtralExtConfig,
    "qwen3_moe_ext": Qwen3MoeExtConfig,
}
# What a family has beside the others: Qwen3-MoE's heads have a width of their own by default of the checkpoints, and its
# experts are narrower than a dense layer.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 48, "intermediate_size": 56, "head_dim": 12}
}
_COMMON: dict[str, Any] = {**COMMON, "num_hidden_layers": 2, "num_experts_per_tok": 3}
# The blocks a model may have; every key of the configuration is in one of them.
BLOCKS: dict[str, dict[str, Any]] = {
    "standard": {},
    "ungated": {"moe_block": "dcca"},
    "gated": {"moe_block": "dcca", "moe_expert_gated": True},
    "full": {
        "moe_block": "dcca",
        "moe_latent_size": 16,
        "moe_expert_intermediate_size": 24,
        "moe_expert_act": "relu",
        "moe_latent_norm": True,
        "moe_shared_expert_intermediate_size": 16,
    },
    "mixed": {"moe_block": ["standard", "dcca"]},
}
_UNIVERSAL: dict[str, Any] = {"moe_shared_expert_intermediate_size": 48, "norm_topk_prob": True}
# Blocks whose experts share a base; every form, and every key beside it, is in one of them.
DERS_BLOCKS: dict[str, dict[str, Any]] = {
    "low_rank": {"moe_block": "ders"},
    "sparse": {"moe_block": "ders", "ders_delta": "sparse", "ders_seed": 5},
    "quantized": {"moe_block": "ders", "ders_delta": "quantized", "ders_group_size": 16},
    "sparse_values": {
        "moe_block": "ders",
        "ders_delta": "sparse",
        "ders_drop_rate": 0.7,
        "ders_bits": 8,
        "ders_stored_positions": True,
    },
    "universal": {"moe_block": "ders", "ders_share_universal": True, "ders_bias": True, **_UNIVERSAL},
    "beside": {"moe_block": "ders", "ders_universal_gate": "add", "ders_bias": True, **_UNIVERSAL},
    "some_layers": {
        "moe_block": ["dense", "ders", "standard", "ders", "dcca"],
        "num_hidden_layers": 5,
        "ders_rank": [None, {"gate": 1, "up": 2, "down": 3}, None, 4, None],
    },
}


def make_config(family: str = "olmoe_ext", block: str = "ungated", **overrides: Any) -> Any:
    """A tiny configuration of a family with the settings of ``BLOCKS[block]``."""
    return FAMILIES[family](
        **{**stock_settings(family.removesuffix("_ext")), **(BLOCKS | DERS_BLOCKS)[block], **overrides}
    )


def stock_settings(family: str) -> dict[str, Any]:
    """The same settings for the stock configuration of ``olmoe``, ``mixtral`` or ``qwen3_moe``."""
    experts = "num_local_experts" if family == "mixtral" else "num_experts"
    return {**_COMMON, experts: 8, **_OF_FAMILY.get(family, {})}


def make_model(
    family: str = "olmoe_ext", block: str = "ungated", seed: int = 0, dtype: torch.dtype = torch.float32, **kw: Any
) -> Any:
    """A tiny random causal language model in eval mode; ``experts_implementation`` is "batched_mm" in float64."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    implementation = kw.pop("experts_implementation", "batched_mm" if dtype == torch.float64 else None)
    chosen = {} if implementation is None else {"experts_implementation": implementation}
    return AutoModelForCausalLM.from_config(make_config(family, block, **kw), dtype=dtype, **chosen).eval()


@dataclass(frozen=True)
class LatentBlock:
    """The parameters of a ``DccaMoeBlock``; ``up`` [E, F, R], ``gate`` [E, F, R] or None, ``down`` [E, R, F]."""

    router: Tensor
    descend: Tensor
    up: Tensor
    gate: Tensor | None
    down: Tensor
    ascend: Tensor
    act: Callable[[Tensor], Tensor]
    top_k: int
    normalize: bool
    norm_weight: Tensor | None
    norm_eps: float
    shared: tuple[Tensor, ...]

    @classmethod
    def read(cls, block: nn.Module, config: Any) -> LatentBlock:
        """Read a block's parameters."""
        experts: Any = block.experts
        gate, up = None, getattr(experts, "up_proj", None)
        if up is None:
            width = experts.down_proj.shape[2]
            gate, up = experts.gate_up_proj[:, :width], experts.gate_up_proj[:, width:]
        norm = getattr(block, "latent_norm", None)
        shared: tuple[Tensor, ...] = ()
        if hasattr(block, "shared_expert"):
            names = ("gate_proj", "up_proj", "down_proj") if config.moe_expert_gated else ("up_proj", "down_proj")
            shared = tuple(getattr(block.shared_expert, name).weight for name in names)
        return cls(
            router=block.gate.weight,
            descend=block.descend.weight,
            up=up,
            gate=gate,
            down=experts.down_proj,
            ascend=block.ascend.weight,
            act=experts.act_fn,
            top_k=config.num_experts_per_tok,
            normalize=getattr(config, "norm_topk_prob", True),
            norm_weight=None if norm is None else norm.weight,
            norm_eps=config.rms_norm_eps,
            shared=shared,
        )

    def expert(self, i: int, z: Tensor) -> Tensor:
        """E_i(z), [latent]."""
        inner = self.up[i] @ z
        inner = self.act(inner) if self.gate is None else self.act(self.gate[i] @ z) * inner
        return self.down[i] @ inner


def latent_moe_block(hidden: Tensor, block: LatentBlock, ascend_first: bool = False) -> Tensor:
    """Token by token, expert by expert (arXiv 2502.16927, section 3).

    Args:
        hidden: [tokens, hidden], float64.
        block: from ``LatentBlock.read``.
        ascend_first: ascend each expert's output and combine then; equal, because ascend is linear (no latent norm).
    """
    rows = []
    for x in hidden:
        probs = torch.softmax(block.router @ x, dim=-1)
        chosen = largest(probs, block.top_k)
        weights = torch.stack([probs[i] for i in chosen])
        if block.normalize:
            weights = weights / weights.sum()
        z = block.descend @ x
        outputs = [w * block.expert(i, z) for i, w in zip(chosen, weights, strict=True)]
        if ascend_first:
            y = sum((block.ascend @ output for output in outputs), torch.zeros_like(x))
        else:
            u = torch.stack(outputs).sum(0)
            if block.norm_weight is not None:
                u = block.norm_weight * u / torch.sqrt((u**2).mean() + block.norm_eps)
            y = block.ascend @ u
        if block.shared:
            *first, down = block.shared
            inner = block.act(first[0] @ x) if len(first) == 1 else block.act(first[0] @ x) * (first[1] @ x)
            y = y + down @ inner
        rows.append(y)
    return torch.stack(rows)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, kinds and bits."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
