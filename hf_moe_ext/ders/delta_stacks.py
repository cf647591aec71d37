"""The N deltas of one matrix of an expert, as the two forwards use them.

A stack gives the code of one expert's delta as it is stored (``delta``), its matrix (``matrix``) and rows times its transpose
(``linear``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe_ext.ops.delta_indices import Indices
from hf_moe_ext.ops.delta_quantization import QuantizedDelta
from hf_moe_ext.ops.deltas import Delta, LowRankDelta, SparseDelta


class DeltaStack(Protocol):
    """Deltas [out, in] of ``num_experts`` experts, all of one form."""

    @property
    def num_experts(self) -> int:
        """How many there are."""

    def delta(self, expert: int) -> Delta:
        """The code of one, as it is stored."""

    def matrix(self, expert: int) -> Tensor:
        """One, decoded: [out, in]; gradients reach what trains."""

    def linear(self, rows: Tensor, expert: int) -> Tensor:
        """``rows D^T``: [rows, in] to [rows, out]; what autograd keeps is smaller than D."""


@dataclass(frozen=True, eq=False)
class LowRankStack:
    """``D_i = B_i A_i``.

    Attributes:
        A: [num_experts, rank, in].
        B: [num_experts, out, rank].
    """

    A: Tensor
    B: Tensor

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        """Of each delta."""
        return self.A.shape[1]

    @cached_property
    def _factors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # One node for all experts: each ``A[i]`` of its own would write a gradient of the whole stack.
        return self.A.unbind(0), self.B.unbind(0)

    def delta(self, expert: int) -> LowRankDelta:
        """The code of one."""
        A, B = self._factors
        return LowRankDelta(A[expert], B[expert])

    def matrix(self, expert: int) -> Tensor:
        """``B A``."""
        return self.delta(expert).decode()

    def linear(self, rows: Tensor, expert: int) -> Tensor:
        """``(rows A^T) B^T``; keeps [rows, rank]."""
        A, B = self._factors
        return F.linear(F.linear(rows, A[expert].to(rows.dtype)), B[expert].to(rows.dtype))


@dataclass(frozen=True, eq=False)
class QuantizedStack:
    """Frozen codes of few bits.

    Attributes:
        shape: (out, in).
        bits: an entry; 16 has the entries themselves for codes.
        group_size: inputs that share a scale.
        dtype: what a delta is decoded to.
        codes: uint8 [num_experts, out, packed].
        scales: [num_experts, out, groups]; None with 16 bits.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor | None

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return self.codes.shape[0]

    def delta(self, expert: int) -> QuantizedDelta:
        """The code of one."""
        scales = None if self.scales is None else self.scales[expert]
        return QuantizedDelta(self.shape, self.bits, self.group_size, self.dtype, self.codes[expert], scales)

    def matrix(self, expert: int) -> Tensor:
        """Decoded; no gradients."""
        return self.delta(expert).decode()

    def linear(self, rows: Tensor, expert: int) -> Tensor:
        """Decodes one dense delta, uses it and lets it go; decoded anew in the backward."""
        return _DecodedLinear.apply(rows, None, self.delta(expert))


@dataclass(frozen=True, eq=False)
class SparseStack:
    """Values at positions that a seed regenerates, or that are stored.

    Attributes:
        values: [num_experts, n]; or frozen ones of few bits, as matrices of one row (1, n).
        indices: of each expert, as they are stored.
        held: the same positions, in memory where ``indices`` would generate them at each use; None without.
    """

    values: Tensor | QuantizedStack
    indices: Sequence[Indices]
    held: Sequence[Indices] | None = None

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self.indices)

    @cached_property
    def _rows(self) -> tuple[Tensor, ...]:
        assert isinstance(self.values, Tensor)
        return self.values.unbind(0)

    def delta(self, expert: int) -> SparseDelta:
        """The code of one."""
        return self._code(expert, self.indices[expert])

    def matrix(self, expert: int) -> Tensor:
        """Scattered into zeros; gradients reach values that are not quantised."""
        return self._code(expert, self._positions(expert)).decode()

    def linear(self, rows: Tensor, expert: int) -> Tensor:
        """Scatters the values into one dense delta, uses it and lets it go; made anew in the backward."""
        positions = self._positions(expert)
        if isinstance(self.values, QuantizedStack):
            return _DecodedLinear.apply(rows, None, self._code(expert, positions))
        return _DecodedLinear.apply(rows, self._rows[expert], positions)

    def _positions(self, expert: int) -> Indices:
        return (self.held or self.indices)[expert]

    def _code(self, expert: int, indices: Indices) -> SparseDelta:
        quantised = isinstance(self.values, QuantizedStack)
        return SparseDelta(indices, self.values.delta(expert) if quantised else self._rows[expert])  # type: ignore[union-attr]


class _DecodedLinear(torch.autograd.Function):
    """``rows D^T`` of a delta that is decoded for the forward and again for the backward, and kept for neither.

    With ``values``, the gradient of each is that of D at its position: dV = (dY^T rows) gathered (section 3.9 of our notes
    on the paper: the sampled product). Forming dY^T rows takes one dense GEMM and one temporary of D's size.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor | None, code: Indices | Delta) -> Tensor:
        ctx.save_for_backward(rows, values)
        ctx.code = code
        delta = SparseDelta(code, values) if isinstance(values, Tensor) else code  # type: ignore[arg-type]
        return F.linear(rows, delta.decode().to(rows.dtype))  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (rows, values) = gradients, ctx.saved_tensors
        rows_gradient = values_gradient = None
        if values is None:
            if ctx.needs_input_grad[0]:
                rows_gradient = gradient @ ctx.code.decode().to(gradient.dtype)
            return rows_gradient, None, None
        # Once for both uses: generating positions is what a sparse delta costs most.
        positions, shape = ctx.code.positions(values.device), ctx.code.shape
        if ctx.needs_input_grad[0]:
            flat = gradient.new_zeros(shape[0] * shape[1])
            flat[positions] = values.to(gradient.dtype)
            rows_gradient = gradient @ flat.view(shape)
            del flat
        if ctx.needs_input_grad[1]:
            values_gradient = (gradient.T @ rows).view(-1)[positions].to(values.dtype)
        return rows_gradient, values_gradient, None
