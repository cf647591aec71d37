"""A checkpoint read without mapping its files: what was read and let go is memory no more.

`CheckpointReader` maps a shard, and every page that was looked at counts as memory of the process until the file is closed;
for a conversion that promises a bound, whole and partial tensors are read into memory of their own instead.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_moe_ext.convert.checkpoint import CheckpointReader

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# safetensors refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000


class TensorPlace(NamedTuple):
    """Where a tensor stands.

    Attributes:
        path: its shard.
        dtype: what it is stored as.
        shape: its shape.
        start: first byte, from the beginning of the file.
        num_bytes: how many.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class StreamingReader(CheckpointReader):
    """``CheckpointReader`` whose tensors are copies, and that reads parts of tensors.

    Attributes:
        places: every tensor, in the order of the shards.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """As ``CheckpointReader``; raises its errors, among them for a truncated shard."""
        super().__init__(folder)
        self._open_shard = None  # it was mapped for its names
        self.places: dict[str, TensorPlace] = {}
        for path in dict.fromkeys(self._shard_of.values()):
            self.places.update(read_places(path))

    def read(self, name: str) -> Tensor:
        """One tensor; raises KeyError where there is none of this name."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows ``start`` to ``stop`` (None: all) of a tensor along its first axis.

        Raises:
            KeyError: there is none of this name.
        """
        self._shard(name)
        place = self.places[name]
        if not place.shape:
            return _to_tensor(_read_bytes(place, 0, place.num_bytes), place.dtype, ())
        stop = place.shape[0] if stop is None else stop
        row_bytes = place.num_bytes // place.shape[0] if place.shape[0] else 0
        content = _read_bytes(place, start * row_bytes, stop * row_bytes)
        return _to_tensor(content, place.dtype, (stop - start, *place.shape[1:]))

    def read_expert(self, name: str, expert: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of one expert's matrix in a stack [experts, rows, cols]."""
        place = self.places[name]
        _, rows, cols = place.shape
        row_bytes = cols * place.dtype.itemsize
        first = (expert * rows + start) * row_bytes
        content = _read_bytes(place, first, first + (stop - start) * row_bytes)
        return _to_tensor(content, place.dtype, (stop - start, cols))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        self._shard(name)
        return self.places[name].shape

    @property
    def shards(self) -> list[Path]:
        """The files."""
        return list(dict.fromkeys(self._shard_of.values()))

    @property
    def file_bytes(self) -> int:
        """Size of all shards, headers included."""
        return sum(path.stat().st_size for path in self.shards)


def read_places(path: Path) -> dict[str, TensorPlace]:
    """What a safetensors file's header says.

    Raises:
        ValueError: a file that is cut off, or none of safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"checkpoint shard {path} is cut off or no safetensors file; download it again")
        header = json.loads(file.read(header_bytes))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"checkpoint shard {path}: {name} is stored as {entry['dtype']}, which is not supported")
        if 8 + header_bytes + end > size:
            raise ValueError(f"checkpoint shard {path} is cut off within {name}; download it again")
        place = TensorPlace(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header_bytes + begin, end - begin)
        if place.num_bytes != math.prod(place.shape) * place.dtype.itemsize:
            raise ValueError(f"checkpoint shard {path}: {name} has another size than its shape says; download it again")
        places[name] = place
    return places


def _read_bytes(place: TensorPlace, start: int, stop: int) -> bytearray:
    content = bytearray(stop - start)
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start + start)
        view, done = memoryview(content), 0
        while done < len(content):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"checkpoint shard {place.path} ended early; it was changed while it was read")
            done += count
    return content


def _to_tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape)
