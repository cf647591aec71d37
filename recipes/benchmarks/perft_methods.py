"""What `perft.py` compares: model shapes, fine-tuning methods, and ranks that give them equal active parameters."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedModel

from hf_moe_ext import PerftConfig, count_trainable


@dataclass(frozen=True)
class Shape:
    """A base model, the batch it is fed, and where."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    top_k: int
    vocab_size: int
    batch_size: int
    length: int
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0


PRESETS = {
    # OLMoE's proportions (experts of half the width, top 8 of 64, the head a tenth of the work) at sizes for 2 and 4 cores.
    "cpu2": Shape("olmoe", 512, 256, 4, 8, 8, 64, 8, 4096, 2, 256, threads=2),
    "cpu4": Shape("olmoe", 1024, 512, 4, 16, 16, 64, 8, 8192, 4, 256, threads=4),
    # allenai/OLMoE-1B-7B, whole.
    "gpu80-olmoe": Shape("olmoe", 2048, 1024, 16, 16, 16, 64, 8, 50304, 2, 2048, "bfloat16", "cuda"),
    # mistralai/Mixtral-8x7B with 8 of its 32 layers: all of it in bfloat16 is 93 GB.
    "gpu80-mixtral": Shape("mixtral", 4096, 14336, 8, 32, 8, 8, 2, 32000, 1, 2048, "bfloat16", "cuda"),
}

REFERENCE = "LoRA q, v"


def build_base(shape: Shape, seed: int) -> PreTrainedModel:
    """A random model of this shape, built where it will run, frozen, in training mode."""
    sizes: dict[str, Any] = {
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": shape.length,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "vocab_size"),
    ):
        sizes[name] = getattr(shape, name)
    if shape.family == "olmoe":
        config: Any = OlmoeConfig(num_experts=shape.num_experts, **sizes)
    else:
        config = MixtralConfig(num_local_experts=shape.num_experts, **sizes)
    torch.manual_seed(seed)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    return model.requires_grad_(False).train()


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A model of its own modules over the same storage, so that adapters of many methods need the weights once."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in base.parameters()}
    return copy.deepcopy(base, memo=shared)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        active_per_rank: active adapter parameters of one layer per unit of rank.
        config: makes the PEFT configuration of a rank; None: no adapter.
        active_fixed: active parameters of one layer that the rank does not change (R's router).
        trains_base: full fine-tuning.
    """

    active_per_rank: Callable[[Shape], int] | None = None
    config: Callable[[int], PeftConfig] | None = None
    active_fixed: Callable[[Shape], int] = lambda shape: 0
    trains_base: bool = False


def _perft(variant: Literal["R", "E", "D", "S"], num_experts: int | None = None, top_k: int | None = None) -> Method:
    """PERFT's counts per layer: S 2 D r, D M 2 D r, R N 2 D r + M D, E K 2 D r."""
    active = {"S": 1, "D": num_experts, "R": top_k}.get(variant)

    def config(rank: int) -> PeftConfig:
        return PerftConfig(
            task_type="CAUSAL_LM", variant=variant, r=rank, lora_alpha=2 * rank, num_experts=num_experts, top_k=top_k
        )

    return Method(
        active_per_rank=lambda shape: 2 * shape.hidden_size * (active or shape.top_k),
        config=config,
        active_fixed=lambda shape: (num_experts or 0) * shape.hidden_size if variant == "R" else 0,
    )


def _lora(**targets: Any) -> Callable[[int], PeftConfig]:
    return lambda rank: LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, **targets)


def _query_value_parameters(shape: Shape) -> int:
    value_size = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    return 2 * shape.hidden_size + shape.hidden_size + value_size


METHODS = {
    "frozen base": Method(),
    REFERENCE: Method(_query_value_parameters, _lora(target_modules=["q_proj", "v_proj"])),
    "LoRA on experts": Method(
        # One expert: gate_up_proj [2 I, D] and down_proj [D, I].
        lambda shape: shape.top_k * (2 * shape.hidden_size + 3 * shape.intermediate_size),
        # An empty list: PEFT would add its default attention modules of the family.
        _lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "full": Method(trains_base=True),
    "R 1 of 4": _perft("R", 4, 1),
    "R 2 of 4": _perft("R", 4, 2),
    "R 1 of 8": _perft("R", 8, 1),
    "R 2 of 8": _perft("R", 8, 2),
    "E": _perft("E"),
    "D 4": _perft("D", 4),
    "S": _perft("S"),
}


def choose_rank(method: Method, shape: Shape, reference_rank: int) -> int | None:
    """The rank with the active parameters of LoRA q, v, or as near as whole ranks come; None without adapter."""
    if method.active_per_rank is None:
        return None
    budget = _query_value_parameters(shape) * reference_rank - method.active_fixed(shape)
    return max(1, int(budget / method.active_per_rank(shape) + 0.5))


def attach(base: PreTrainedModel, method: Method, rank: int | None) -> nn.Module:
    """The method's model over the base's weights; the gradient flows down to the embeddings' output in every method.

    Gradient checkpointing asks for just that. Without it the gradient of PERFT ends at the first block's experts, that of
    LoRA q, v one attention and one set of experts lower: little of 16 layers, but a sixth of the step of 4.
    """
    model: Any = share_weights(base)
    model.enable_input_require_grads()
    if method.trains_base:
        return model.requires_grad_(True)
    if method.config is not None and rank is not None:
        return get_peft_model(model, method.config(rank))
    return model


def count_adapter(model: nn.Module, method: Method, shape: Shape, rank: int | None) -> tuple[int, int]:
    """(trainable, active per token) parameters, by `count_trainable` for PERFT, by formula for the others."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored, active = count_trainable(model)
    if stored and active is not None:
        return trainable, active
    if method.active_per_rank is not None and rank is not None:
        return trainable, shape.num_hidden_layers * method.active_per_rank(shape) * rank
    if not method.trains_base:
        return 0, 0
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return trainable, trainable - experts + experts * shape.top_k // shape.num_experts
