"""One decoder layer of a checkpoint under the names of its modules, whichever way its experts are stored.

| checkpoint | one expert's matrices (gate, up, down) | router |
|---|---|---|
| stock OLMoE, Qwen3-MoE | ``mlp.experts.N.gate_proj.weight``, ``up_proj``, ``down_proj`` | ``mlp.gate.weight`` |
| stock Mixtral | ``block_sparse_moe.experts.N.w1.weight``, ``w3``, ``w2`` | ``block_sparse_moe.gate.weight`` |
| ``*_ext`` | ``mlp.experts.gate_up_proj`` [E, 2F, H] and ``down_proj`` [E, H, F], stacked | ``mlp.gate.weight`` |
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_moe_ext.convert.checkpoint import CheckpointReader

LAYER_PREFIX = "model.layers."
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# model_type -> name of the block and of an expert's matrices on disk.
_STOCK = {
    "mixtral": ("block_sparse_moe", {role: name for name, role in _ROLES.items()}),
    "olmoe": ("mlp", {role: role for role in _ROLES.values()}),
    "qwen3_moe": ("mlp", {role: role for role in _ROLES.values()}),
}
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
STANDARD_BLOCK = {GATE_UP, DOWN, ROUTER}


def outer_names(reader: CheckpointReader) -> list[str]:
    """Tensors that belong to no layer: embedding, last norm, head."""
    return [name for name in reader.names if not name.startswith(LAYER_PREFIX)]


def read_layer(reader: CheckpointReader, layer: int, num_experts: int) -> dict[str, Tensor]:
    """All tensors of a layer, named as below ``model.layers.N.``, experts stacked.

    Raises:
        ValueError: no such layer, an expert without one of its matrices, or weights that are quantised.
    """
    prefix = f"{LAYER_PREFIX}{layer}."
    state: dict[str, Tensor] = {}
    single: dict[tuple[str, int], str] = {}
    for name in reader.names:
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if found := _EXPERT.fullmatch(rest):
            single[_ROLES.get(found[2], found[2]), int(found[1])] = name
        else:
            state[rest.replace("block_sparse_moe.", "mlp.", 1)] = reader.read(name)
    if not state and not single:
        raise ValueError(f"checkpoint {reader.folder} has no layer {layer}: no tensor starts with {prefix!r}")
    if single:
        state |= _stack_experts(reader, single, layer, num_experts)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(
                f"checkpoint {reader.folder}: {prefix}{name} is stored as {tensor.dtype}, so it is quantised; convert the "
                "checkpoint in full precision it was made from, and quantise the result"
            )
    return state


def stock_tensors(name: str, tensor: Tensor, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """A tensor of a model of standard blocks as the stock families store it: one matrix per expert, their names.

    Args:
        name: of the module, or as the stock family stores it already.
        tensor: its values; on the meta device only their shapes matter.
        model_type: "mixtral", "olmoe" or "qwen3_moe".

    Yields:
        Name and tensor; experts' matrices are copies, so that one can be kept without the rest.
    """
    block, roles = _STOCK[model_type]
    name = name.replace(".mlp.", f".{block}.", 1)
    prefix, separator, stacked = name.rpartition(".experts.")
    if not separator or stacked not in ("gate_up_proj", "down_proj"):
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        parts = matrix.chunk(2) if stacked == "gate_up_proj" else (matrix,)
        for role, part in zip(("gate_proj", "up_proj") if len(parts) == 2 else ("down_proj",), parts, strict=True):
            yield f"{prefix}.experts.{expert}.{roles[role]}.weight", part.clone()


def stock_expert_name(layer: int, expert: int, role: str, model_type: str) -> str:
    """Name of one expert's matrix ("gate_proj", "up_proj" or "down_proj") in a stock checkpoint."""
    block, roles = _STOCK[model_type]
    return f"{LAYER_PREFIX}{layer}.{block}.experts.{expert}.{roles[role]}.weight"


def check_standard_block(state: dict[str, Tensor], layer: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a layer whose block is not the plain router and gated experts.

    Raises:
        ValueError: a missing, additional (bias, shared expert) or mis-shaped tensor, by name.
    """
    names = {name for name in state if name.startswith("mlp.")}
    more, missing = sorted(names - STANDARD_BLOCK), sorted(STANDARD_BLOCK - names)
    if more:
        raise ValueError(
            f"layer {layer} has {more[0]} beside its router and experts, which a DCCA block has no place for; leave the "
            "layer out with layers (--layers)"
        )
    if missing:
        raise ValueError(f"layer {layer} of the checkpoint has no {missing[0]}; it is incomplete, download it again")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"layer {layer}: {name} is {tuple(state[name].shape)}, its config.json says {shape}")


def _stack_experts(
    reader: CheckpointReader, single: dict[tuple[str, int], str], layer: int, num_experts: int
) -> dict[str, Tensor]:
    wanted = [(role, expert) for role in ("gate_proj", "up_proj", "down_proj") for expert in range(num_experts)]
    missing = [f"{role} of expert {expert}" for role, expert in wanted if (role, expert) not in single]
    if missing or len(single) != len(wanted):
        raise ValueError(
            f"layer {layer} of the checkpoint: config.json says {num_experts} experts, but "
            + (f"there is no {missing[0]}" if missing else f"there are matrices of {len(single) // 3}")
        )
    (width, hidden), example = reader.shape(single["gate_proj", 0]), reader.read(single["gate_proj", 0])
    gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=example.dtype)
    down = torch.empty(num_experts, hidden, width, dtype=example.dtype)
    # Straight into their place: a list of all experts and their stack would be the layer twice.
    for expert in range(num_experts):
        gate_up[expert, :width] = reader.read(single["gate_proj", expert])
        gate_up[expert, width:] = reader.read(single["up_proj", expert])
        down[expert] = reader.read(single["down_proj", expert])
    return {GATE_UP: gate_up, DOWN: down}
