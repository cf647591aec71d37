"""From codes of single deltas to the state of one matrix's deltas in ``DersExperts``: what converters write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_indices import Indices, SeededIndices
from hf_moe_ext.ops.delta_metadata import LAYOUT
from hf_moe_ext.ops.delta_quantization import QuantizedDelta
from hf_moe_ext.ops.deltas import Delta, LowRankDelta, SparseDelta


def stack_deltas(codes: Sequence[Delta]) -> dict[str, Tensor]:
    """Tensors ``delta_<matrix>_<part>`` of ``DersExperts`` by part, the inverse of ``experts.deltas(matrix).delta(i)``.

    Args:
        codes: of the experts' deltas of one matrix, in the order of the experts. Sparse ones from a seed are of the exact
            form, and their streams are kept as they are, whatever seed they name; others store their positions.

    Returns:
        "A", "B" | "values" or "codes" and "scales", each with "stream" or "positions" (int32, ascending) | "codes" and
        "scales"; no scales with 16 bits. Each [num_experts, ...].

    Raises:
        ValueError: no codes, codes that differ in form, shape, count, bits, group size or dtype, or that ``DersExperts``
            has no place for (another layout, zero points, the Bernoulli form, positions beyond int32).
        TypeError: no code of a delta.
    """
    if not codes:
        raise ValueError("codes must have one delta an expert, got none")
    traits = [_traits(code, expert) for expert, code in enumerate(codes)]
    for expert, found in enumerate(traits):
        if found.keys() != traits[0].keys():
            raise ValueError(_refusal("form", expert, found["form"], traits[0]["form"]))
        for name, value in found.items():
            if value != traits[0][name]:
                raise ValueError(_refusal(name, expert, value, traits[0][name]))
    parts = [_parts(code, expert) for expert, code in enumerate(codes)]
    return {name: torch.stack([each[name] for each in parts]) for name in parts[0]}


def _refusal(name: str, expert: int, value: Any, first: Any) -> str:
    return (
        f"codes of one matrix must agree in {name} to be stacked, got {first!r} for expert 0 and {value!r} for expert "
        f"{expert}; encode all experts' deltas with the same settings"
    )


def _traits(code: Delta, expert: int) -> dict[str, Any]:
    """All that must be the same for every expert."""
    if isinstance(code, LowRankDelta):
        own = {"form": "low rank", "rank": code.A.shape[0], "dtype": (code.A.dtype, code.B.dtype)}
    elif isinstance(code, QuantizedDelta):
        own = {"form": "quantised", **_grid_traits(code, expert)}
    elif isinstance(code, SparseDelta):
        own = {"form": _sparse_form(code, expert), "kept entries": code.indices.num_kept}
        values = code.values
        own |= _grid_traits(values, expert) if isinstance(values, QuantizedDelta) else {"dtype": values.dtype}
    else:
        raise TypeError(f"codes must be LowRankDelta, SparseDelta or QuantizedDelta, got {type(code).__name__}")
    if code.layout != LAYOUT:
        raise ValueError(
            f"codes must be of matrices stored as {LAYOUT!r}, got {code.layout!r} for expert {expert}; decode it, "
            "transpose or split the matrix, and encode it anew"
        )
    return own | {"shape": tuple(code.shape)}


def _sparse_form(code: SparseDelta, expert: int) -> str:
    # Before counts are compared: they differ for this reason.
    if isinstance(code.indices, SeededIndices) and code.indices.drop_rate is not None:
        raise ValueError(
            f"positions of a seed must be of the exact form, got the Bernoulli form (drop_rate={code.indices.drop_rate}) "
            f"for expert {expert}, which keeps another number of entries for each; use drop_at_random(..., exact=True)"
        )
    indices = "positions of a seed" if isinstance(code.indices, SeededIndices) else "stored positions"
    return f"sparse, {indices}, {'trained' if isinstance(code.values, Tensor) else 'quantised'} values"


def _grid_traits(code: QuantizedDelta, expert: int) -> dict[str, Any]:
    if code.zero_points is not None:
        raise ValueError(
            f"codes must have no zero points, which the experts do not store; got some for expert {expert}: quantize with "
            "zero_points=False and fit='least_squares'"
        )
    # With 16 bits there are no groups.
    if code.scales is None:
        return {"bits": code.bits, "dtype": code.codes.dtype}
    return {"bits": code.bits, "group size": code.group_size, "dtype": code.scales.dtype}


def _parts(code: Delta, expert: int) -> dict[str, Tensor]:
    if not isinstance(code, SparseDelta):
        return code.tensors()
    values = code.values
    # Quantised values are a matrix of one row.
    own = {"values": values} if isinstance(values, Tensor) else {n: t[0] for n, t in values.tensors().items()}
    if isinstance(code.indices, SeededIndices):
        return own | code.indices.tensors()
    positions = _stored(code.indices, expert)
    if bool((positions.diff() > 0).all()):
        return own | {"positions": positions.to(torch.int32)}
    if not isinstance(values, Tensor):
        raise ValueError(
            f"positions of quantised values must ascend, those of expert {expert} do not; sort positions and values "
            "before values are quantised"
        )
    positions, order = positions.sort()
    return {"values": values[order], "positions": positions.to(torch.int32)}


def _stored(indices: Indices, expert: int) -> Tensor:
    rows, cols = indices.shape
    if rows * cols > 2**31:
        raise ValueError(
            f"positions are stacked as int32, which reaches 2**31 entries, got {rows} x {cols} for expert {expert}; use "
            "positions of a seed"
        )
    return indices.positions()
