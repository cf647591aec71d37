"""What is stored of the deltas of one matrix: form and numbers, and the parts [num_experts, ...] that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from hf_moe_ext.ops.delta_metadata import check_rank
from hf_moe_ext.ops.delta_positions import check_drop_rate, count_kept
from hf_moe_ext.ops.delta_quantization import BITS

DeltaForm = Literal["low_rank", "sparse", "quantized"]
# Numbers of the matrices in a mask's name, the same for gated and un-gated experts.
MATRICES = ("gate", "up", "down")

_NEEDED = {"low_rank": "rank", "sparse": "drop_rate", "quantized": "bits"}
_ALLOWED = {"low_rank": ("rank",), "sparse": ("drop_rate", "bits"), "quantized": ("bits",)}


class Part(NamedTuple):
    """One stored tensor.

    Attributes:
        shape: [num_experts, ...].
        dtype: None for the default one, which moves with the model's.
        trains: a parameter; else a buffer, saved too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    trains: bool = False


@dataclass(frozen=True)
class MatrixForm:
    """Form of the deltas [out, in] of one matrix.

    Attributes:
        form: "low_rank", "sparse" or "quantized".
        shape: (out, in).
        rank: of a low-rank delta.
        drop_rate: share of a sparse delta's entries that are zero.
        bits: of a quantised delta's entry, or of a sparse delta's value; None where values train.
        group_size: inputs of a quantised delta, or neighbouring values of a sparse one, that share a scale.
        stored_positions: of a sparse delta: its positions are stored; else the seed that regenerates them.
    """

    form: DeltaForm
    shape: tuple[int, int]
    rank: int | None = None
    drop_rate: float | None = None
    bits: int | None = None
    group_size: int = 128
    stored_positions: bool = False

    @property
    def num_kept(self) -> int:
        """Entries of a sparse delta, the same for each expert: round((1 - p) out in)."""
        assert self.drop_rate is not None
        return count_kept(self.shape[0] * self.shape[1], self.drop_rate)

    def parts(self, num_experts: int) -> dict[str, Part]:
        """Stored tensors by the last word of their name, ``delta_<matrix>_<part>``."""
        rows, cols = self.shape
        if self.form == "low_rank":
            assert self.rank is not None
            factors = {"A": (self.rank, cols), "B": (rows, self.rank)}
            return {name: Part((num_experts, *shape), trains=True) for name, shape in factors.items()}
        if self.form == "quantized":
            return self._grid((num_experts, rows), cols)
        numbers = (num_experts, self.num_kept)
        values = {"values": Part(numbers, trains=True)} if self.bits is None else self._grid(numbers[:1], numbers[1])
        if self.stored_positions:
            return values | {"positions": Part(numbers, torch.int32)}
        return values | {"stream": Part((num_experts, 4), torch.int64)}

    def _grid(self, rows: tuple[int, ...], cols: int) -> dict[str, Part]:
        assert self.bits is not None
        if self.bits == 16:
            return {"codes": Part((*rows, cols))}
        codes = Part((*rows, -(-cols * self.bits // 8)), torch.uint8)
        return {"codes": codes, "scales": Part((*rows, -(-cols // self.group_size)), torch.bfloat16)}


def matrix_forms(
    delta: str,
    shapes: Mapping[str, tuple[int, int]],
    numbers: Mapping[str, Any],
    group_size: int = 128,
    stored_positions: bool = False,
) -> dict[str, MatrixForm]:
    """The form of each matrix, from numbers for all matrices or for each.

    Args:
        delta: "low_rank", "sparse" or "quantized".
        shapes: (out, in) of each matrix by name.
        numbers: "rank", "drop_rate", "bits": None, one number, or a mapping with one for each name in ``shapes``.
        group_size: see ``MatrixForm``.
        stored_positions: see ``MatrixForm``.

    Raises:
        ValueError: no such form, its number missing, one of another form given, a mapping that does not name the
            matrices, a value outside its bounds, positions to store without a sparse form or beyond int32.
        TypeError: a number that is none.
    """
    if delta not in get_args(DeltaForm):
        raise ValueError(f"delta must be one of {', '.join(get_args(DeltaForm))}, got {delta!r}")
    for name, value in numbers.items():
        if value is None and name == _NEEDED[delta]:
            raise ValueError(f"delta={delta!r} needs {name}, got None")
        if value is not None and name not in _ALLOWED[delta]:
            raise ValueError(f"delta={delta!r} has no {name}, got {name}={value!r}; leave it out")
    if stored_positions and delta != "sparse":
        raise ValueError(f"stored_positions is for delta='sparse', got delta={delta!r}; leave it out")
    each = {name: _per_matrix(name, value, tuple(shapes)) for name, value in numbers.items()}
    forms = {}
    for matrix, shape in shapes.items():
        own = {name: values[matrix] for name, values in each.items()}
        _check(matrix, shape, own, stored_positions)
        forms[matrix] = MatrixForm(delta, shape, **own, group_size=group_size, stored_positions=stored_positions)  # type: ignore[arg-type]
    return forms


def _per_matrix(name: str, value: Any, matrices: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(matrices, value)
    if set(value) != set(matrices) or None in value.values():
        raise ValueError(
            f"{name} must be one number, or a mapping with one for each of {', '.join(matrices)}, got {dict(value)!r}"
        )
    return dict(value)


def _check(matrix: str, shape: tuple[int, int], own: Mapping[str, Any], stored_positions: bool) -> None:
    if own["rank"] is not None:
        check_rank(own["rank"], *shape)
    if own["drop_rate"] is not None:
        check_drop_rate(own["drop_rate"])
    bits = own["bits"]
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if stored_positions and shape[0] * shape[1] > 2**31:
        raise ValueError(
            f"stored_positions are int32 and reach 2**31 entries, {matrix} has {shape[0]} x {shape[1]}; leave it out: "
            "a seed's positions have no such limit"
        )
