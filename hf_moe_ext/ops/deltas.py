"""Codes of a delta ``D = W_expert - W_base`` [rows, cols]: low rank, sparse, quantised.

DeRS (arXiv 2503.01359) stores an upcycled expert as the dense parent's matrix plus a cheap code of the difference. Each code
is a frozen dataclass with ``decode()`` (differentiable where its values train), ``num_bytes`` (what a safetensors file
holds for it, without the header: indices, scales and seeds count) and ``tensors()`` plus ``metadata()`` for saving;
``read_delta`` reads those.

| code | encoders |
|---|---|
| ``LowRankDelta`` | ``delta_encoders``: ``low_rank_from_svd``, ``low_rank_at_birth`` |
| ``SparseDelta`` | ``delta_encoders``: ``drop_at_random``, ``drop_small``, ``sparse_at_birth`` |
| ``delta_quantization.QuantizedDelta``, also as a sparse delta's values | ``delta_quantization.quantize`` |

A matrix is stored as ``nn.Linear`` stores it, rows are outputs; so ``B A`` here is the paper's ``(A B)`` transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_indices import Indices, read_indices
from hf_moe_ext.ops.delta_metadata import (
    FORMAT_VERSION,
    LAYOUT,
    check_rank,
    check_tensors,
    count_bytes,
    read_metadata,
    read_shape,
)
from hf_moe_ext.ops.delta_quantization import QuantizedDelta, quantize


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """``D = B A``.

    Attributes:
        A: [rank, cols].
        B: [rows, rank].
        layout: how the matrix is stored.
    """

    A: Tensor
    B: Tensor
    layout: str = LAYOUT

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes in a safetensors file, without its header."""
        return count_bytes(self.tensors())

    def decode(self) -> Tensor:
        """The matrix [rows, cols]."""
        return self.B @ self.A

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {"A": self.A, "B": self.B}

    def metadata(self) -> dict[str, Any]:
        """What is needed beside it, fit for JSON."""
        return {
            "kind": "low_rank",
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "rank": self.A.shape[0],
            "layout": self.layout,
        }


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """A matrix that is zero outside some positions.

    Attributes:
        indices: where the kept entries stand.
        values: [num_kept] in the order of ``indices.positions()``, or a ``QuantizedDelta`` of them as one row.
    """

    indices: Indices
    values: Tensor | QuantizedDelta

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.indices.shape

    @property
    def layout(self) -> str:
        """How the matrix is stored."""
        return self.indices.layout

    @property
    def num_bytes(self) -> int:
        """Bytes in a safetensors file, without its header: values, indices or seed, scales."""
        return count_bytes(self.tensors())

    def decoded_values(self) -> Tensor:
        """Values [num_kept] as floating-point numbers."""
        return self.values.decode()[0] if isinstance(self.values, QuantizedDelta) else self.values

    def decode(self) -> Tensor:
        """The matrix [rows, cols]; gradients reach ``values``."""
        values = self.decoded_values()
        rows, cols = self.shape
        return values.new_zeros(rows * cols).scatter(0, self.indices.positions(values.device), values).view(rows, cols)

    def quantize(
        self,
        bits: int,
        group_size: int | None = 128,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> "SparseDelta":
        """The same positions with values of few bits; see ``delta_quantization.quantize``."""
        if isinstance(self.values, QuantizedDelta):
            raise ValueError(
                f"values are quantised to {self.values.bits} bits already; quantise the values they came from"
            )
        return replace(self, values=quantize(self.values[None], bits, group_size, scale_dtype=scale_dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        values = self.values
        stored = {"": values} if isinstance(values, Tensor) else {f".{name}": t for name, t in values.tensors().items()}
        indices = {f"indices.{name}": tensor for name, tensor in self.indices.tensors().items()}
        return indices | {f"values{name}": tensor for name, tensor in stored.items()}

    def metadata(self) -> dict[str, Any]:
        """What is needed beside it, fit for JSON; costs one generation of the positions, for their checksum."""
        return {
            "kind": "sparse",
            "format_version": FORMAT_VERSION,
            "indices": self.indices.metadata(),
            "values": None if isinstance(self.values, Tensor) else self.values.metadata(),
        }


Delta = LowRankDelta | SparseDelta | QuantizedDelta


def read_delta(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    shape: tuple[int, int] | None = None,
    layout: str = LAYOUT,
    verify: bool = True,
) -> Delta:
    """Build the code that ``tensors()`` and ``metadata()`` gave, perhaps through a file.

    Args:
        tensors: as stored.
        metadata: as stored; JSON gives back what was given to it.
        shape: the matrix it must belong to; None takes any.
        layout: how that matrix is stored.
        verify: regenerate a sparse code's positions and compare their checksum.

    Raises:
        ValueError: damaged or foreign metadata, tensors that are not the ones it describes, another shape, layout or
            position algorithm, a checksum that differs.
    """
    kind = metadata.get("kind")
    delta: Delta
    if kind == "low_rank":
        delta = _read_low_rank(tensors, metadata)
    elif kind == "sparse":
        delta = _read_sparse(tensors, metadata, verify)
    elif kind == "quantized":
        delta = QuantizedDelta.from_parts(tensors, metadata)
    else:
        raise ValueError(
            f"metadata: kind must be low_rank, sparse or quantized, got {kind!r}; this is no delta of ours"
        )
    if shape is not None and tuple(delta.shape) != tuple(shape):
        raise ValueError(
            f"the delta is for a matrix of shape {tuple(delta.shape)}, got one of {tuple(shape)}; wrong base"
        )
    if delta.layout != layout:
        raise ValueError(
            f"the delta is for a matrix stored as {delta.layout!r}, got {layout!r}; its positions would mean other "
            "entries, so decode it in its own layout first"
        )
    return delta


def _read_low_rank(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> LowRankDelta:
    values = read_metadata(metadata, "low_rank", {"shape": (list, tuple), "rank": int, "layout": str})
    rows, cols = read_shape(values)
    check_rank(values["rank"], rows, cols)
    check_tensors(tensors, {"A": (values["rank"], cols), "B": (rows, values["rank"])})
    return LowRankDelta(tensors["A"], tensors["B"], values["layout"])


def _read_sparse(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], verify: bool) -> SparseDelta:
    parts = read_metadata(metadata, "sparse", {"indices": dict, "values": (dict, type(None))})
    of_indices = {name.removeprefix("indices."): t for name, t in tensors.items() if name.startswith("indices.")}
    of_values = {name: t for name, t in tensors.items() if not name.startswith("indices.")}
    indices = read_indices(of_indices, parts["indices"], verify)
    if parts["values"] is None:
        check_tensors(of_values, {"values": (indices.num_kept,)})
        return SparseDelta(indices, of_values["values"])
    values = QuantizedDelta.from_parts(
        {name.removeprefix("values."): tensor for name, tensor in of_values.items()}, parts["values"]
    )
    if values.shape != (1, indices.num_kept):
        raise ValueError(
            f"sparse delta: {indices.num_kept} positions, but quantised values of shape {values.shape}; its tensors and "
            "metadata are not of one file"
        )
    return SparseDelta(indices, values)
