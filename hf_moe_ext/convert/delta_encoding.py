"""How deltas are encoded: one method and its numbers, what it will cost, and how far off it will be.

| method | ``ders_delta`` | numbers | positions |
|---|---|---|---|
| ``random_drop`` | sparse | drop_rate, perhaps bits of the values | from a seed |
| ``magnitude_drop`` | sparse | drop_rate, perhaps bits of the values | stored, int32 |
| ``svd`` | low_rank | rank | - |
| ``quantize`` | quantized | bits, group_size | - |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_moe_ext.ops.delta_encoders import drop_at_random, drop_small, low_rank_from_svd
from hf_moe_ext.ops.delta_measures import output_norm
from hf_moe_ext.ops.delta_metadata import check_rank
from hf_moe_ext.ops.delta_positions import MaskStream, check_drop_rate, count_kept
from hf_moe_ext.ops.delta_quantization import BITS, quantize
from hf_moe_ext.ops.deltas import Delta

RANDOM_DROP, MAGNITUDE_DROP, SVD, QUANTIZE = "random_drop", "magnitude_drop", "svd", "quantize"
FORMS = {RANDOM_DROP: "sparse", MAGNITUDE_DROP: "sparse", SVD: "low_rank", QUANTIZE: "quantized"}
# The paper's own sweep and what its advice leaves open between; ranks are shares of the smaller dimension.
DROP_RATES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
RANK_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
_DEFAULT_DROP_RATE, _DEFAULT_BITS, _DEFAULT_RANK_SHARE = 0.6, 4, 1 / 8
_POSITION_BYTES, _STREAM_BYTES, _SCALE_BYTES = 4, 32, 2


@dataclass(frozen=True)
class Encoding:
    """A method and its numbers.

    Attributes:
        method: a key of ``FORMS``.
        drop_rate: of a drop.
        rank: of ``svd``; None for an eighth of the smaller dimension, until ``fill_in``.
        bits: of ``quantize``, or of a drop's values (None: as they are).
        group_size: inputs, or values, that share a scale.
    """

    method: str
    drop_rate: float | None = None
    rank: int | None = None
    bits: int | None = None
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.method not in FORMS:
            raise ValueError(f"encode must be one of {', '.join(FORMS)}, got {self.method!r}")
        form = self.form
        for name, wanted in (("drop_rate", "sparse"), ("rank", "low_rank")):
            if getattr(self, name) is not None and form != wanted:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with encode={self.method!r}; leave it out"
                )
        if self.drop_rate is not None:
            check_drop_rate(self.drop_rate)
        if self.bits is not None:
            allowed = {"sparse": BITS[1:], "quantized": BITS, "low_rank": ()}[form]
            if type(self.bits) is not int or self.bits not in allowed:
                rule = f"one of {', '.join(map(str, allowed))}" if allowed else "left out"
                raise ValueError(f"bits must be {rule} with encode={self.method!r}, got {self.bits!r}")
        if type(self.group_size) is not int or self.group_size < 1:
            raise ValueError(f"group_size must be a positive int, got {self.group_size!r}")

    @property
    def form(self) -> str:
        """``ders_delta`` of the configuration."""
        return FORMS[self.method]

    def fill_in(self, shape: tuple[int, int]) -> "Encoding":
        """The same with defaults in place of what is open, for a matrix of this shape.

        Raises:
            ValueError: a rank above the smaller dimension, or a rate that keeps nothing.
        """
        if self.method == SVD:
            rank = max(1, round(min(shape) * _DEFAULT_RANK_SHARE)) if self.rank is None else self.rank
            check_rank(rank, *shape)
            return replace(self, rank=rank)
        if self.method == QUANTIZE:
            return replace(self, bits=_DEFAULT_BITS if self.bits is None else self.bits)
        filled = replace(self, drop_rate=_DEFAULT_DROP_RATE if self.drop_rate is None else self.drop_rate)
        assert filled.drop_rate is not None
        if count_kept(shape[0] * shape[1], filled.drop_rate) == 0:
            raise ValueError(
                f"drop_rate={filled.drop_rate} keeps no entry of a {shape[0]} x {shape[1]} matrix; lower it"
            )
        return filled

    def grid(self, shape: tuple[int, int]) -> list["Encoding"]:
        """The same method at the rates a budget chooses among, cheapest first, those that a matrix can have."""
        if self.method == SVD:
            ranks = sorted({max(1, round(share * min(shape))) for share in RANK_SHARES})
            return [replace(self, rank=rank) for rank in ranks]
        if self.method == QUANTIZE:
            return [replace(self, bits=bits) for bits in reversed(BITS)]
        kept = [rate for rate in reversed(DROP_RATES) if count_kept(shape[0] * shape[1], rate) > 0]
        return [replace(self, drop_rate=rate) for rate in kept]

    def encode(self, delta: Tensor, stream: MaskStream, dtype: torch.dtype) -> Delta:
        """The code of one delta [rows, cols], in float32, its numbers stored as ``dtype``."""
        if self.method == SVD:
            assert self.rank is not None
            return low_rank_from_svd(delta, self.rank, dtype)
        if self.method == QUANTIZE:
            assert self.bits is not None
            quantized = quantize(delta.to(dtype) if self.bits == 16 else delta, self.bits, self.group_size)
            return replace(quantized, dtype=dtype)
        assert self.drop_rate is not None
        if self.method == RANDOM_DROP:
            sparse = drop_at_random(delta, self.drop_rate, stream, rescale=True, exact=True)
        else:
            sparse = drop_small(delta, self.drop_rate, stored="flat")
        if self.bits is not None:
            code = sparse.quantize(self.bits, self.group_size)
            assert not isinstance(code.values, Tensor)
            return replace(code, values=replace(code.values, dtype=dtype))
        assert isinstance(sparse.values, Tensor)
        return replace(sparse, values=sparse.values.to(dtype))

    def count_bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of one expert's code of a matrix of this shape, indices, scales and seed counted."""
        rows, cols = shape
        if self.method == SVD:
            assert self.rank is not None
            return self.rank * (rows + cols) * dtype.itemsize
        if self.method == QUANTIZE:
            assert self.bits is not None
            return _grid_bytes(rows, cols, self.bits, self.group_size, dtype)
        assert self.drop_rate is not None
        kept = count_kept(rows * cols, self.drop_rate)
        places = _STREAM_BYTES if self.method == RANDOM_DROP else _POSITION_BYTES * kept
        return places + (
            kept * dtype.itemsize if self.bits is None else _grid_bytes(1, kept, self.bits, self.group_size, dtype)
        )

    def break_even(self, shape: tuple[int, int], dtype: torch.dtype, num_experts: int) -> str:
        """At what rate base and deltas take as many bytes as the experts: p, rank or bits (section 3.6 of our notes)."""
        share = (num_experts - 1) / num_experts  # of the experts' bytes, left for the deltas after the base
        width = dtype.itemsize
        if self.method == SVD:
            rows, cols = shape
            return f"rank below {share * rows * cols / (rows + cols):.4g}"
        if self.method == QUANTIZE:
            return f"bits + 16 / group_size below {8 * width * share:.4g}"
        values = width if self.bits is None else self.bits / 8 + _SCALE_BYTES / self.group_size
        entry_bytes = values + (_POSITION_BYTES if self.method == MAGNITUDE_DROP else 0)
        return f"drop_rate above {max(0.0, 1 - share * width / entry_bytes):.4g}"

    def label(self) -> str:
        """For the report."""
        numbers = {"drop_rate": self.drop_rate, "rank": self.rank, "bits": self.bits}
        return " ".join([self.method, *(f"{name}={value:g}" for name, value in numbers.items() if value is not None)])


def squared_errors(delta: Tensor, encodings: Sequence[Encoding], moments: Tensor) -> list[float]:
    """What each encoding would add to ``||E x||^2`` on average, ``E`` the error of the code.

    Exact but for the rounding of stored numbers; of a random drop the expectation over masks, with bits as if the kept
    values shared their scales with their neighbours in the whole delta. Encodings share their method and bits.

    Args:
        delta: [rows, cols], float32.
        encodings: of one method.
        moments: E[x_j^2] of the inputs, [cols].
    """
    method, first = encodings[0].method, encodings[0]
    if method == QUANTIZE:
        return [0.0 if e.bits == 16 else _quantised_error(delta, e, moments) for e in encodings]
    if method == SVD:
        _, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        parts = S.double().square() * (Vh.double().square() @ moments.double())
        left = parts.flip(0).cumsum(0).flip(0)  # what ranks 0, 1, ... leave out
        return [float(left[e.rank]) if e.rank is not None and e.rank < len(left) else 0.0 for e in encodings]
    if method == RANDOM_DROP:
        return _random_drop_errors(delta, [e.drop_rate or 0 for e in encodings], first, moments)
    return _magnitude_drop_errors(delta, [e.drop_rate or 0 for e in encodings], first, moments)


def _random_drop_errors(delta: Tensor, drop_rates: list[float], encoding: Encoding, moments: Tensor) -> list[float]:
    energy, rounding, shrinking = output_norm(delta, moments) ** 2, 0.0, 0.0
    if encoding.bits is not None:
        lost = quantize(delta.reshape(1, -1), encoding.bits, encoding.group_size).decode().reshape(delta.shape) - delta
        rounding = output_norm(lost, moments) ** 2
        # Fitted scales make values smaller, which takes back some of what dividing the kept ones by 1 - p adds.
        shrinking = float((lost.double() * delta.double()).sum(dim=0) @ moments.double())
    return [(p * energy + rounding + 2 * p * shrinking) / (1 - p) for p in drop_rates]


def _magnitude_drop_errors(delta: Tensor, drop_rates: list[float], encoding: Encoding, moments: Tensor) -> list[float]:
    values = delta.reshape(-1)
    order = values.abs().sort(descending=True, stable=True).indices
    weights = moments.double().repeat(delta.shape[0])
    left = (values.double().square() * weights)[order.flip(0)].cumsum(0).flip(0)  # what keeping 0, 1, ... leaves out
    errors = []
    for p in drop_rates:
        num_kept = count_kept(len(values), p)
        error = float(left[num_kept]) if num_kept < len(values) else 0.0
        if encoding.bits is not None:
            kept = order[:num_kept].sort().values  # a group of scales is of neighbours among the kept
            lost = quantize(values[kept].reshape(1, -1), encoding.bits, encoding.group_size).decode()[0] - values[kept]
            error += float(lost.double().square() @ weights[kept])
        errors.append(error)
    return errors


def _quantised_error(delta: Tensor, encoding: Encoding, moments: Tensor) -> float:
    assert encoding.bits is not None
    code = quantize(delta, encoding.bits, encoding.group_size)
    return output_norm(code.decode() - delta, moments) ** 2


def _grid_bytes(rows: int, cols: int, bits: int, group_size: int, dtype: torch.dtype) -> int:
    if bits == 16:
        return rows * cols * dtype.itemsize
    return rows * (math.ceil(cols * bits / 8) + _SCALE_BYTES * math.ceil(cols / group_size))
