"""Deltas of 8, 4, 2 or 1 bits an entry, with a scale per group of inputs fitted to least squares.

DeRS (arXiv 2503.01359) gives no scheme, and its 1-bit deltas collapse as plain min-max rounding does. Here an entry is
``level * scale + zero_point`` with the ``2^b`` equally spaced levels ``q - (2^b - 1) / 2``; scale (and zero point, where
asked for) minimise the squared error of their group together with the codes. One bit becomes sign x mean|D|, as in
BitDelta (arXiv 2402.10193): relative error sqrt(1 - 2/pi) = 0.603 on Gaussian entries. Plain min-max rounding is here too,
to be compared with.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_metadata import (
    FORMAT_VERSION,
    LAYOUT,
    check_matrix,
    check_tensors,
    count_bytes,
    read_dtype,
    read_metadata,
    read_shape,
    write_dtype,
)

BITS = (16, 8, 4, 2, 1)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LEAST_SQUARES, MIN_MAX = "least_squares", "min_max"
# Ends of the grid to start the fit from, as shares of the largest magnitude and as multiples of the standard deviation.
_START_RANGES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.65)
_START_DEVIATIONS = (1.0, 1.25, 1.5, 2.5, 3.0)
_NUM_FITS = 6
_CHUNK_ENTRIES = 2**18


@dataclass(frozen=True, eq=False)
class QuantizedDelta:
    """A matrix of few bits an entry, in groups along its columns (an ``nn.Linear``'s inputs).

    Attributes:
        shape: rows and columns.
        bits: 16 keeps the entries as they came.
        group_size: columns that share a scale; the last group of a row may be shorter.
        dtype: what ``decode`` gives.
        codes: uint8 [rows, ceil(cols * bits / 8)], first entry in the lowest bits; with 16 bits the entries themselves.
        scales: [rows, groups]; None with 16 bits.
        zero_points: [rows, groups] value of the middle of the grid; None where it is 0.
        layout: how the matrix is stored.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor | None = None
    zero_points: Tensor | None = None
    layout: str = LAYOUT

    def decode(self) -> Tensor:
        """The matrix [rows, cols] it stands for."""
        if self.scales is None:
            return self.codes.clone()
        work = torch.promote_types(self.scales.dtype, torch.float32)
        decoded = unpack(self.codes, self.bits, self.shape[1]).to(work) - (2**self.bits - 1) / 2
        decoded *= self._spread(self.scales).to(work)
        if self.zero_points is not None:
            decoded += self._spread(self.zero_points).to(work)
        return decoded.to(self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes in a safetensors file, without its header: codes, scales and zero points."""
        return count_bytes(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        stored = {"codes": self.codes, "scales": self.scales, "zero_points": self.zero_points}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def metadata(self) -> dict[str, Any]:
        """What is needed beside it, fit for JSON."""
        return {
            "kind": "quantized",
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "dtype": write_dtype(self.dtype),
            "zero_points": self.zero_points is not None,
            "layout": self.layout,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> "QuantizedDelta":
        """Read what ``tensors`` and ``metadata`` gave.

        Raises:
            ValueError: damaged metadata, or tensors that are not the ones it describes.
        """
        fields = {
            "shape": (list, tuple),
            "bits": int,
            "group_size": int,
            "dtype": str,
            "zero_points": bool,
            "layout": str,
        }
        values = read_metadata(metadata, "quantized", fields)
        shape, bits, group_size = read_shape(values), values["bits"], values["group_size"]
        _check_grid(bits, group_size)
        wanted: dict[str, tuple[int, ...]] = {"codes": (shape[0], -(-shape[1] * bits // 8))}
        if bits == 16:
            wanted = {"codes": shape}
        else:
            wanted |= dict.fromkeys(
                ["scales", *["zero_points"] * values["zero_points"]], (shape[0], -(-shape[1] // group_size))
            )
        check_tensors(tensors, wanted)
        scales, zero_points = tensors.get("scales"), tensors.get("zero_points")
        dtype = read_dtype(values["dtype"])
        return cls(shape, bits, group_size, dtype, tensors["codes"], scales, zero_points, values["layout"])

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]


@torch.no_grad()
def quantize(
    delta: Tensor,
    bits: int,
    group_size: int | None = 128,
    zero_points: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    fit: str = LEAST_SQUARES,
    layout: str = LAYOUT,
) -> QuantizedDelta:
    """Encode a delta in few bits.

    Args:
        delta: [rows, cols]; with 16 bits it is kept as it is, so give it in a dtype of 16 bits to have 16.
        bits: 16, 8, 4, 2 or 1.
        group_size: columns that share a scale; None for a whole row.
        zero_points: fit the middle of each group's grid too, for deltas that are not centred. Without them the fitted grid
            has one number a group less than min-max: on Gaussian groups of 128 it errs by 0.0064 at 8 bits and 0.0995 at
            4, plain min-max by 0.0059 and 0.0998, a fit with zero points by 0.0058 and 0.0926.
        scale_dtype: of scales and zero points; codes are chosen for the rounded scale.
        fit: "least_squares", or "min_max": range of the group divided evenly, rounded to nearest, always with zero points.
        layout: how the matrix is stored.

    Raises:
        ValueError: no finite matrix, bits, group size, fit or scale_dtype not among those above, or a scale that
            ``scale_dtype`` cannot hold.
        TypeError: no floating-point tensor.
    """
    check_matrix("delta", delta)
    rows, cols = delta.shape
    group_size = cols if group_size is None else group_size
    _check_grid(bits, group_size)
    if fit not in (LEAST_SQUARES, MIN_MAX):
        raise ValueError(f"fit must be {LEAST_SQUARES!r} or {MIN_MAX!r}, got {fit!r}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {', '.join(map(str, SCALE_DTYPES))}, got {scale_dtype}")
    if bits == 16:
        return QuantizedDelta((rows, cols), 16, group_size, delta.dtype, delta.clone(), layout=layout)
    num_groups = -(-cols // group_size)
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=delta.device)
    scales = torch.empty(rows, num_groups, dtype=scale_dtype, device=delta.device)
    middles = torch.zeros_like(scales)
    for at, groups, columns in _parts(rows, cols, group_size):
        grouped, mask = _group(delta[at, columns], group_size)
        scale, middle = _fit(grouped, mask, bits, zero_points, fit)
        scales[at, groups], middles[at, groups] = _round_scales(scale, scale_dtype), middle.to(scale_dtype)
        levels = _levels(grouped, scales[at, groups].to(grouped), middles[at, groups].to(grouped), bits)
        part = (levels + (2**bits - 1) / 2).to(torch.uint8)
        codes[at, columns] = part.reshape(len(part), -1)[:, : codes[at, columns].shape[1]]
    kept = middles if zero_points or fit == MIN_MAX else None
    return QuantizedDelta((rows, cols), bits, group_size, delta.dtype, pack(codes, bits), scales, kept, layout)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Several codes a byte: uint8 [rows, cols] below 2^bits -> uint8 [rows, ceil(cols * bits / 8)], first one lowest."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(len(codes), -1, per_byte)
    packed = codes[..., 0].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, num_columns: int) -> Tensor:
    """The codes uint8 [rows, num_columns] of ``pack``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :num_columns]


def _check_grid(bits: int, group_size: int) -> None:
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive int, or None for whole rows, got {group_size!r}")


def _parts(rows: int, cols: int, group_size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, groups and columns of pieces of a bounded size; a group is never cut."""
    groups_at_once = max(1, min(cols, _CHUNK_ENTRIES) // group_size)
    rows_at_once = max(1, _CHUNK_ENTRIES // min(cols, groups_at_once * group_size))
    for row in range(0, rows, rows_at_once):
        for group in range(0, -(-cols // group_size), groups_at_once):
            stop = group + groups_at_once
            columns = slice(group * group_size, min(stop * group_size, cols))
            yield slice(row, row + rows_at_once), slice(group, stop), columns


def _group(part: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """[rows, groups, group_size] in at least float32, and 1 where an entry is no padding, [groups, group_size]."""
    work = part.to(torch.promote_types(part.dtype, torch.float32))
    padding = -part.shape[1] % group_size
    mask = torch.nn.functional.pad(work.new_ones(part.shape[1]), (0, padding)).view(-1, group_size)
    return torch.nn.functional.pad(work, (0, padding)).view(len(part), -1, group_size), mask


def _fit(grouped: Tensor, mask: Tensor, bits: int, zero_points: bool, fit: str) -> tuple[Tensor, Tensor]:
    """Scale and middle of each group, both [rows, groups]."""
    top = (2**bits - 1) / 2
    if fit == MIN_MAX or zero_points:
        low = grouped.masked_fill(mask == 0, torch.inf).amin(-1)
        high = grouped.masked_fill(mask == 0, -torch.inf).amax(-1)
        middle, reach = (low + high) / 2, (high - low) / 2
        if fit == MIN_MAX:
            return reach / top, middle
    else:
        reach, middle = grouped.abs().amax(-1), torch.zeros_like(grouped[..., 0])
        if bits == 1:
            # The least-squares scale of the signs, in closed form; levels are -1/2 and 1/2.
            return 2 * grouped.abs().sum(-1) / mask.sum(-1), middle
    return _alternate(grouped, mask, bits, zero_points, *_start(grouped, mask, bits, reach, middle))


def _start(grouped: Tensor, mask: Tensor, bits: int, reach: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """The best of a few grids whose ends lie at shares of the range or at multiples of the standard deviation."""
    count = mask.sum(-1)
    deviation = (((grouped - middle[..., None]) * mask).square().sum(-1) / count).sqrt()
    ends = [reach * share for share in _START_RANGES]
    ends += [torch.minimum(reach, deviation * times) for times in _START_DEVIATIONS]
    best_scale, best_error = reach, torch.full_like(reach, torch.inf)
    for end in ends:
        scale = end / ((2**bits - 1) / 2)
        error = _error(grouped, mask, _levels(grouped, scale, middle, bits), scale, middle)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale, middle


def _alternate(
    grouped: Tensor, mask: Tensor, bits: int, zero_points: bool, scale: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes for the scale, then the scale for the codes, some times: neither step can raise the squared error."""
    count = mask.sum(-1)
    for _ in range(_NUM_FITS):
        levels = _levels(grouped, scale, middle, bits) * mask
        mean_level = levels.sum(-1) / count if zero_points else torch.zeros_like(scale)
        mean_value = (grouped * mask).sum(-1) / count if zero_points else torch.zeros_like(scale)
        centred = (levels - mean_level[..., None]) * mask
        spread = centred.square().sum(-1)
        slope = (centred * (grouped - mean_value[..., None])).sum(-1) / spread.clamp(min=torch.finfo(spread.dtype).tiny)
        # All codes equal: there is no slope to fit, and the scale in hand stays.
        scale = torch.where(spread > 0, slope, scale)
        if zero_points:
            middle = mean_value - scale * mean_level
    return scale, middle


def _levels(grouped: Tensor, scale: Tensor, middle: Tensor, bits: int) -> Tensor:
    """Nearest levels, half-integers within the grid; [rows, groups, group_size]."""
    top = (2**bits - 1) / 2
    positive = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]
    codes = ((grouped - middle[..., None]) / positive + top).round_()
    return codes.clamp_(0, 2 * top).sub_(top)


def _error(grouped: Tensor, mask: Tensor, levels: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    return ((grouped - levels * scale[..., None] - middle[..., None]) * mask).square().sum(-1)


def _round_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    if ((scale > 0) & (rounded == 0)).any() or not rounded.isfinite().all():
        raise ValueError(
            f"scale_dtype={dtype} cannot hold the scales of this delta ({scale.min():.3g} to {scale.max():.3g}); use "
            "torch.bfloat16 or torch.float32, which have the range"
        )
    return rounded
