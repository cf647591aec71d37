"""Where the kept entries of a sparse delta stand: regenerated from a seed, or stored in one of three forms.

| form | stored | bytes |
|---|---|---|
| ``SeededIndices`` | seed, layer, matrix, expert | 32 |
| ``FlatIndices`` | row-major position, int32 or int64 | 4n or 8n |
| ``RowIndices`` | column as uint16, row pointers as int32 or int64 | 2n + 4(rows + 1) |
| ``BitmapIndices`` | one bit per entry | ceil(S / 8) |

Only a random mask can come from a seed; one that depends on the data (magnitude) pays for its indices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_metadata import FORMAT_VERSION, LAYOUT, check_tensors, read_metadata, read_shape
from hf_moe_ext.ops.delta_positions import (
    ALGORITHM,
    VERSION,
    MaskStream,
    bernoulli_chunks,
    bernoulli_positions,
    check_drop_rate,
    checksum,
    count_kept,
    exact_positions,
)

STORED_FORMS = ("flat", "flat64", "row", "bitmap")
_SHAPE_FIELDS = {"shape": (list, tuple), "layout": str, "num_kept": int, "checksum": str}


class Indices(Protocol):
    """Positions of the kept entries of a matrix [rows, cols]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    @property
    def layout(self) -> str:
        """How the matrix is stored; row-major positions mean something else in another layout."""

    @property
    def num_kept(self) -> int:
        """How many entries are kept."""

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Row-major positions int64 [num_kept] in the order of the values; made anew at each call."""

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""

    def metadata(self) -> dict[str, Any]:
        """What is needed beside it, fit for JSON."""


@dataclass(frozen=True)
class SeededIndices:
    """Positions regenerated at each use, so that neither file nor memory holds them.

    Attributes:
        shape: rows and columns.
        stream: names the mask.
        drop_rate: of the Bernoulli form; None for the exact form.
        num_kept: kept entries; n of the exact form.
        layout: how the matrix is stored.
    """

    shape: tuple[int, int]
    stream: MaskStream
    drop_rate: float | None
    num_kept: int
    layout: str = LAYOUT

    @classmethod
    def bernoulli(
        cls, shape: tuple[int, int], stream: MaskStream, drop_rate: float, layout: str = LAYOUT
    ) -> "SeededIndices":
        """Each entry is kept with probability 1 - drop_rate; a rate outside (0, 1) raises ValueError."""
        num_kept = sum(len(chunk) for chunk in bernoulli_chunks(stream, shape[0] * shape[1], drop_rate))
        return cls(shape, stream, drop_rate, num_kept, layout)

    @classmethod
    def exact(
        cls, shape: tuple[int, int], stream: MaskStream, drop_rate: float, layout: str = LAYOUT
    ) -> "SeededIndices":
        """Exactly round(S (1 - drop_rate)) entries are kept; a rate outside (0, 1) raises ValueError."""
        return cls(shape, stream, None, count_kept(shape[0] * shape[1], drop_rate), layout)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Ascending in the Bernoulli form, in no order in the exact one."""
        num_entries, device = self.shape[0] * self.shape[1], device or "cpu"
        if self.drop_rate is None:
            return exact_positions(self.stream, num_entries, self.num_kept, device)
        return bernoulli_positions(self.stream, num_entries, self.drop_rate, device)

    def tensors(self) -> dict[str, Tensor]:
        """The four numbers of the stream: 32 bytes."""
        stream = self.stream
        return {"stream": torch.tensor([stream.seed, stream.layer, stream.matrix, stream.expert], dtype=torch.int64)}

    def metadata(self) -> dict[str, Any]:
        """Algorithm and version too; the checksum costs one generation of the positions."""
        form = {"algorithm": ALGORITHM, "algorithm_version": VERSION, "drop_rate": self.drop_rate}
        return _describe(self, "seeded") | form


@dataclass(frozen=True, eq=False)
class FlatIndices:
    """Row-major positions, as they are: ``flat`` [num_kept], int32 or int64."""

    shape: tuple[int, int]
    flat: Tensor
    layout: str = LAYOUT

    @property
    def num_kept(self) -> int:
        """How many entries are kept."""
        return len(self.flat)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """In the order they were stored."""
        return self.flat.to(device=device or self.flat.device, dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """The positions."""
        return {"flat": self.flat}

    def metadata(self) -> dict[str, Any]:
        """Shape, layout, count, checksum."""
        return _describe(self, "flat")


@dataclass(frozen=True, eq=False)
class RowIndices:
    """Compressed rows: ``columns`` uint16 [num_kept] and ``row_pointers`` [rows + 1]; below 65536 columns."""

    shape: tuple[int, int]
    columns: Tensor
    row_pointers: Tensor
    layout: str = LAYOUT

    @property
    def num_kept(self) -> int:
        """How many entries are kept."""
        return len(self.columns)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Ascending."""
        device = device or self.columns.device
        counts = self.row_pointers.to(device).diff()
        rows = torch.arange(self.shape[0], device=device).repeat_interleave(counts, output_size=self.num_kept)
        return rows * self.shape[1] + self.columns.to(device).to(torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """Columns and row pointers."""
        return {"columns": self.columns, "row_pointers": self.row_pointers}

    def metadata(self) -> dict[str, Any]:
        """Shape, layout, count, checksum."""
        return _describe(self, "row")


@dataclass(frozen=True, eq=False)
class BitmapIndices:
    """One bit per entry: ``bitmap`` uint8 [ceil(S / 8)], position q in bit q % 8 of byte q // 8."""

    shape: tuple[int, int]
    bitmap: Tensor
    num_kept: int
    layout: str = LAYOUT

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Ascending."""
        bitmap = self.bitmap.to(device or self.bitmap.device)
        bits = bitmap[:, None] >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
        return bits.reshape(-1).nonzero()[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """The bits."""
        return {"bitmap": self.bitmap}

    def metadata(self) -> dict[str, Any]:
        """Shape, layout, count, checksum."""
        return _describe(self, "bitmap")


def store_positions(positions: Tensor, shape: tuple[int, int], form: str, layout: str = LAYOUT) -> Indices:
    """Store positions.

    Args:
        positions: int64 [num_kept], row-major, strictly ascending.
        shape: rows and columns of the matrix.
        form: "flat" (int32), "flat64" (int64), "row" or "bitmap".
        layout: how the matrix is stored.

    Raises:
        ValueError: unknown form, positions not ascending or outside, more columns or entries than the form can hold.
    """
    rows, cols = shape
    if len(positions) and not (positions[0] >= 0 and positions[-1] < rows * cols and (positions.diff() > 0).all()):
        raise ValueError(f"positions must ascend strictly and lie in [0, {rows * cols}); sort them and their values")
    if form in ("flat", "flat64"):
        if form == "flat" and rows * cols > 2**31:
            raise ValueError(f"form 'flat' holds at most 2**31 entries, got {rows * cols}; use 'flat64' or 'row'")
        return FlatIndices(shape, positions.to(torch.int32 if form == "flat" else torch.int64), layout)
    if form == "row":
        if cols > 2**16:
            raise ValueError(f"form 'row' holds columns up to 65536 as uint16, got {cols}; use 'flat' or 'bitmap'")
        pointers = torch.searchsorted(positions, torch.arange(rows + 1, device=positions.device) * cols)
        width = torch.int32 if len(positions) < 2**31 else torch.int64
        return RowIndices(shape, (positions % cols).to(torch.uint16), pointers.to(width), layout)
    if form == "bitmap":
        bits = torch.zeros(-(-rows * cols // 8) * 8, dtype=torch.uint8, device=positions.device)
        bits[positions] = 1
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=positions.device)
        return BitmapIndices(shape, (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8), len(positions), layout)
    raise ValueError(f"form must be one of {', '.join(STORED_FORMS)}, got {form!r}")


def read_indices(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], verify: bool = True) -> Indices:
    """Build the indices that ``tensors()`` and ``metadata()`` describe.

    Args:
        tensors: as stored.
        metadata: as stored.
        verify: compare the checksum of the positions, which costs one generation of them.

    Raises:
        ValueError: another algorithm, version or format, a missing or mis-shaped part, a count or checksum that differs.
    """
    kind = metadata.get("kind")
    if kind not in ("seeded", "flat", "row", "bitmap"):
        raise ValueError(f"metadata: kind of indices must be seeded, flat, row or bitmap, got {kind!r}")
    indices = (_read_seeded if kind == "seeded" else _read_stored)(tensors, metadata)
    if verify:
        _verify(indices, metadata)
    return indices


def _describe(indices: Indices, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "shape": list(indices.shape),
        "layout": indices.layout,
        "num_kept": indices.num_kept,
        "checksum": checksum(indices.positions(), indices.shape, indices.layout),
    }


def _read_seeded(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Indices:
    fields = {"algorithm": str, "algorithm_version": int, "drop_rate": (float, type(None)), **_SHAPE_FIELDS}
    values = read_metadata(metadata, "seeded", fields)
    found = (values["algorithm"], values["algorithm_version"])
    if found != (ALGORITHM, VERSION):
        raise ValueError(
            f"positions were generated by {found[0]} version {found[1]}, this release has {ALGORITHM} version {VERSION}; "
            "read the file with the release that wrote it, or store its indices"
        )
    check_tensors(tensors, {"stream": (4,)})
    if values["drop_rate"] is not None:
        check_drop_rate(values["drop_rate"])
    stream = MaskStream(*(int(number) for number in tensors["stream"]))
    return SeededIndices(read_shape(values), stream, values["drop_rate"], values["num_kept"], values["layout"])


def _read_stored(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Indices:
    kind = metadata["kind"]
    values = read_metadata(metadata, kind, _SHAPE_FIELDS)
    shape, num_kept, layout = read_shape(values), values["num_kept"], values["layout"]
    if kind == "flat":
        check_tensors(tensors, {"flat": (num_kept,)})
        return FlatIndices(shape, tensors["flat"], layout)
    if kind == "row":
        check_tensors(tensors, {"columns": (num_kept,), "row_pointers": (shape[0] + 1,)})
        pointers = tensors["row_pointers"]
        if pointers[0] != 0 or pointers[-1] != num_kept or (pointers.diff() < 0).any():
            raise ValueError(f"sparse delta: row_pointers must rise from 0 to {num_kept}; the file is damaged")
        return RowIndices(shape, tensors["columns"], pointers, layout)
    check_tensors(tensors, {"bitmap": (-(-shape[0] * shape[1] // 8),)})
    return BitmapIndices(shape, tensors["bitmap"], num_kept, layout)


def _verify(indices: Indices, metadata: Mapping[str, Any]) -> None:
    positions = indices.positions()
    found = {"num_kept": len(positions), "checksum": checksum(positions, indices.shape, indices.layout)}
    for name, value in found.items():
        if value != metadata[name]:
            raise ValueError(
                f"sparse delta: {name} of its positions is {value!r}, its metadata says {metadata[name]!r}; the file is "
                "damaged, or its seed, rate, shape or layout was changed"
            )
