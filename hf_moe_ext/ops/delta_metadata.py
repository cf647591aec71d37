"""What is asked of a delta before it is encoded, and of its metadata before it is believed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
# How our experts' matrices are stored: rows are outputs, columns are inputs, gate and up are two matrices.
LAYOUT = "out_in"


def check_matrix(name: str, matrix: Tensor) -> None:
    """Refuse what is no finite floating-point matrix [rows, cols].

    Raises:
        TypeError: no tensor, or not of a floating-point dtype.
        ValueError: not two dimensions, no entries, or a NaN or infinity among them.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(
            f"{name} must be one matrix [rows, cols] with entries, got shape {tuple(matrix.shape)}; "
            "pass the matrices of a stack one by one"
        )
    if not matrix.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite entries; look for the damaged tensor in the checkpoint")


def check_rank(rank: int, rows: int, cols: int) -> None:
    """Refuse a rank that a matrix [rows, cols] cannot have.

    Raises:
        TypeError: no int.
        ValueError: below 1 or above the smaller dimension.
    """
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an int, got {rank!r} ({type(rank).__name__})")
    if not 1 <= rank <= min(rows, cols):
        raise ValueError(
            f"rank must be at least 1 and at most {min(rows, cols)}, the smaller dimension of the {rows} x {cols} matrix, "
            f"got {rank}"
        )


def read_metadata(metadata: Mapping[str, Any], kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a code's metadata, checked.

    Args:
        metadata: as its ``metadata()`` gave it, perhaps through JSON.
        kind: what it must describe.
        fields: name -> accepted types; None is accepted only where ``type(None)`` is among them.

    Raises:
        ValueError: of another kind or format version, or a field is missing, unknown or of another type.
    """
    if metadata.get("kind") != kind:
        raise ValueError(f"metadata: kind must be {kind!r}, got {metadata.get('kind')!r}; the file holds another code")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"metadata: format_version must be {FORMAT_VERSION}, got {metadata.get('format_version')!r}; "
            "read the file with the release that wrote it"
        )
    values = {name: value for name, value in metadata.items() if name not in ("kind", "format_version")}
    for name, types in fields.items():
        if name not in values:
            raise ValueError(f"metadata of a {kind} code lacks {name!r}; the file is damaged, write it again")
        if not isinstance(values[name], types) or (isinstance(values[name], bool) and types is not bool):
            raise ValueError(f"metadata of a {kind} code: {name} has a value of the wrong kind, {values[name]!r}")
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(
            f"metadata of a {kind} code has an unknown field {unknown[0]!r}; the file is of another release"
        )
    return values


def read_shape(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """The field ``shape`` as two positive numbers.

    Raises:
        ValueError: it is something else.
    """
    shape = metadata["shape"]
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"metadata: shape must be two positive integers [rows, cols], got {shape!r}")
    return shape[0], shape[1]


def read_dtype(name: str) -> torch.dtype:
    """A floating-point dtype by its name without ``torch.``.

    Raises:
        ValueError: no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"metadata: dtype must name a floating-point dtype of torch, got {name!r}")
    return dtype


def write_dtype(dtype: torch.dtype) -> str:
    """The name that ``read_dtype`` reads."""
    return str(dtype).removeprefix("torch.")


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse missing, additional or mis-shaped tensors.

    Raises:
        ValueError: the first such tensor, by name.
    """
    for name, shape in wanted.items():
        if name not in tensors:
            raise ValueError(f"delta lacks the tensor {name!r}; the file is damaged, write it again")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"delta: tensor {name!r} has shape {tuple(tensors[name].shape)}, its metadata says {shape}; "
                "tensors and metadata are not of one file"
            )
    if more := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(f"delta has a tensor {more[0]!r} that its metadata does not know")


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes these tensors take in a safetensors file, without its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
