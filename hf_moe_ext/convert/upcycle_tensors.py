"""The tensors of an upcycled model, one at a time: the parent's, copies of its FFNs, and what is new, drawn from the seed."""

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_moe_ext.convert.checkpoint import CheckpointReader, CheckpointWriter
from hf_moe_ext.convert.dense_parents import DERS
from hf_moe_ext.convert.expert_layout import stock_tensors
from hf_moe_ext.convert.upcycle_plan import UpcyclePlan
from hf_moe_ext.ders.experts import MATRICES
from hf_moe_ext.ops.delta_positions import MaskStream

_FFN = re.compile(r"(model\.layers\.(\d+)\.mlp)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_NEW = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate\.weight|experts\.delta_(gate|up|down)_\w+)")


def write_tensors(plan: UpcyclePlan, names: list[str], reader: CheckpointReader, writer: CheckpointWriter) -> None:
    """Write the whole result; holds one FFN matrix (gate and up together) and what the writer holds.

    Raises:
        RuntimeError: a tensor of the result was left out, or is one too many: a mistake of this package.
    """
    # Shapes and types by module name, in the order of the model.
    outline = plan.outline_result().state_dict()
    left = {name for name in outline if name != "lm_head.weight" or not plan.config.tie_word_embeddings}

    def write(name: str, tensor: Tensor) -> None:
        if name not in left or tensor.shape != outline[name].shape:
            raise RuntimeError(
                f"upcycle: {name} {tuple(tensor.shape)} has no place in the result; report this, with its config"
            )
        left.remove(name)
        named = [(name, tensor)] if plan.settings.form == DERS else stock_tensors(name, tensor, plan.config.model_type)
        for stored_name, stored in named:
            writer.write(stored_name, stored)

    for name in names:
        found = _FFN.fullmatch(name)
        if found is None or int(found[2]) not in plan.layers:
            write(name, read_weight(plan, reader, name))
            continue
        for new_name, tensor in _ffn_tensors(plan, reader, found):
            write(new_name, tensor)
        if found[3] == "down_proj" and found[4] == "weight":
            dtype = plan.dtype or reader.read(name).dtype
            for new_name in [n for n in outline if (new := _NEW.fullmatch(n)) and new[1] == found[2]]:
                write(new_name, make_tensor(plan, new_name, outline[new_name], dtype))
    if left:
        raise RuntimeError(f"upcycle: nothing was written for {min(left)}; report this, with the parent's config.json")


def read_weight(plan: UpcyclePlan, reader: CheckpointReader, name: str) -> Tensor:
    """A tensor of the parent in the result's type."""
    tensor = reader.read(name)
    return tensor if plan.dtype is None else tensor.to(plan.dtype)


def make_tensor(plan: UpcyclePlan, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """What no parent has: a router ~ N(0, router_std^2), or a part of the deltas, which start at zero.

    A low-rank delta's A is uniform in +-1/sqrt(in), as LoRA draws it; its B, values, codes and scales are zero. Drawn in
    float32 from the seed and the name alone, so a router is the same whatever stands beside it.

    Args:
        plan: says seed and spread.
        name: of the module's tensor.
        like: of its shape and kind, on the meta device.
        dtype: of trainable weights; codes, scales and mask names have their own.
    """
    generator = torch.Generator().manual_seed(_seed_of(plan.settings.seed, name))
    if name.endswith("mlp.gate.weight"):
        return (torch.randn(like.shape, generator=generator) * plan.settings.router_std).to(dtype)
    if name.endswith("_A"):
        bound = 1 / math.sqrt(like.shape[-1])
        return torch.empty(like.shape).uniform_(-bound, bound, generator=generator).to(dtype)
    if name.endswith("_stream"):
        return _name_masks(plan.settings.seed, name, like.shape[0])
    own = not like.is_floating_point() or name.endswith("_scales")
    return torch.zeros(like.shape, dtype=like.dtype if own else dtype)


def _ffn_tensors(plan: UpcyclePlan, reader: CheckpointReader, found: re.Match[str]) -> Iterator[tuple[str, Tensor]]:
    """Expert tensors made from one matrix or bias of a layer's FFN; gate and up become one, when gate is met."""
    prefix, part, kind = found[1], found[3], found[4]
    tensor = read_weight(plan, reader, found[0])
    if plan.settings.universal == "keep":
        yield f"{prefix}.shared_expert.{part}.{kind}", tensor.clone()  # a file takes no two names of one memory
    if part == "up_proj":
        return
    if part == "gate_proj":
        up = read_weight(plan, reader, found[0].replace("gate_proj", "up_proj"))
        tensor = torch.cat([tensor, up])
    name = f"{prefix}.experts.{'gate_up_proj' if part == 'gate_proj' else part}"
    num_experts = plan.settings.num_experts
    if kind == "bias":
        members = num_experts + (plan.settings.universal == "extend")
        yield f"{name}_bias", tensor.expand(members, -1)
    elif plan.settings.form == DERS:
        yield name, tensor
    else:
        yield name, tensor.expand(num_experts, -1, -1)  # no memory: each copy is made when it is written


def _name_masks(seed: int, name: str, num_members: int) -> Tensor:
    """[members, 4] names of a sparse delta's masks."""
    found = _NEW.fullmatch(name)
    assert found is not None
    layer, matrix = int(found[1]), MATRICES.index(found[3])
    streams = [MaskStream(seed, layer, matrix, member) for member in range(num_members)]
    return torch.tensor([[s.seed, s.layer, s.matrix, s.expert] for s in streams], dtype=torch.int64)


def _seed_of(seed: int, name: str) -> int:
    """A stream of its own for each tensor, which no order of shards changes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
