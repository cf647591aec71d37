"""``DersExperts``: a module called as stock experts are, whose experts share one base.

Parameters are on-disk names: the base as stock dense FFNs and expert stacks have it, deltas as ``delta_<matrix>_<part>``.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hf_moe_ext.ders.delta_form import MATRICES, DeltaForm, matrix_forms
from hf_moe_ext.ders.delta_stacks import DeltaStack, LowRankStack, QuantizedStack, SparseStack
from hf_moe_ext.ders.forward import fused, materialised
from hf_moe_ext.ders.shared_base import SharedBaseExperts, refuse_fused
from hf_moe_ext.ops.delta_indices import FlatIndices, SeededIndices
from hf_moe_ext.ops.delta_positions import MaskStream

ForwardPath = Literal["fused", "materialised"]


class DersExperts(nn.Module):
    """Experts stored as one shared base plus a delta each; a new one is the dense FFN of its base, whoever is chosen.

    All of it moves with the model's dtype, trained sparse values too. The fused forward multiplies rows by base and delta
    apart, so a delta keeps the relative precision of its own dtype and its steps count however small it is beside the
    base. The materialised forward rounds W + D to the work dtype; training that way in 16 bits warns, because small deltas
    vanish in it. As for any weight, an optimizer in pure 16 bits loses steps below 2^-9 of a value in bfloat16 (the base's
    first, being larger): load in float32 and use autocast, or an optimizer with float32 masters.

    Args:
        hidden_dim: width of the model.
        intermediate_dim: inner width of an expert.
        num_experts: experts of the layer.
        act: a name of Transformers' activations, or any pointwise function.
        gated: ``act(gate) * up``; False: ``act(up)``.
        bias: each expert has biases of its own, in every matrix.
        delta: form of the deltas. Its numbers, ``rank``, ``drop_rate`` and ``bits``, are one for all matrices, or a mapping
            with one for each: "gate", "up" and "down", or "up" and "down" un-gated.
        rank: of low-rank deltas, at most the smaller dimension.
        drop_rate: share of a sparse delta's entries that are zero.
        bits: of a quantised delta's entry: 16, 8, 4, 2 or 1. Of a sparse delta, where given, its values' bits: they are
            frozen then.
        group_size: inputs that share a quantised delta's scale, or neighbouring values of a sparse one.
        seed: of the sparse deltas' positions, the model's.
        layer: index of the decoder layer, for the same.
        stored_positions: sparse deltas store their positions, as masks that depend on the data need (4 bytes each, saved),
            instead of the seed's. A new module has the seed's positions in ascending order.
        train_base: whether the base has gradients.
        train_deltas: whether deltas and the experts' biases have; codes of quantised deltas never do.
        forward_path: "fused", or "materialised" as the paper has it.
        hold_positions: keep sparse deltas' positions in memory (4 bytes each) instead of regenerating them at each use.
        post_norm: norm on each expert's output, before its gate. Materialised forward only, and for a host of one's own, as is
        gates_on_input: gates multiply the experts' inputs, as Llama 4's do.

    Raises:
        ValueError: a value outside its bounds, a fused forward with post_norm or gates_on_input, a form's number missing, or one of another form given.
        TypeError: a number that is none.
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int,
        act: str | Callable[[Tensor], Tensor] = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        delta: DeltaForm = "low_rank",
        rank: int | Mapping[str, int] | None = None,
        drop_rate: float | Mapping[str, float] | None = None,
        bits: int | Mapping[str, int] | None = None,
        group_size: int = 128,
        seed: int = 0,
        layer: int = 0,
        stored_positions: bool = False,
        train_base: bool = True,
        train_deltas: bool = True,
        forward_path: ForwardPath = "fused",
        hold_positions: bool = False,
        post_norm: nn.Module | None = None,
        gates_on_input: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_dim, intermediate_dim, num_experts, group_size)
        if forward_path == "fused":
            refuse_fused(post_norm, gates_on_input)
        if forward_path not in get_args(ForwardPath):
            raise ValueError(f"forward_path must be 'fused' or 'materialised', got {forward_path!r}")
        self.hidden_dim, self.intermediate_dim, self.num_experts = hidden_dim, intermediate_dim, num_experts
        self.act_fn, self.gated, self.has_bias = _find_activation(act), gated, bias
        self.delta, self.group_size, self.seed, self.layer = delta, group_size, seed, layer
        self.rank, self.drop_rate, self.bits, self.stored_positions = rank, drop_rate, bits, stored_positions
        numbers = {"rank": rank, "drop_rate": drop_rate, "bits": bits}
        shapes = {matrix: self.matrix_shape(matrix) for matrix in self.matrices}
        self.forms = matrix_forms(delta, shapes, numbers, group_size, stored_positions)
        if hold_positions and stored_positions:
            raise ValueError(
                "hold_positions is for positions of a seed, stored ones are in memory already; leave it out"
            )
        self.forward_path, self.hold_positions = forward_path, hold_positions
        self.post_norm, self.gates_on_input = post_norm, gates_on_input
        self._held: dict[str, tuple[list[list[int]], list[FlatIndices]]] = {}

        first, wide = ("gate_up_proj", 2 * intermediate_dim) if gated else ("up_proj", intermediate_dim)
        self.register_parameter(first, nn.Parameter(torch.empty(wide, hidden_dim)))
        self.down_proj = nn.Parameter(torch.empty(hidden_dim, intermediate_dim))
        if bias:
            self.register_parameter(f"{first}_bias", nn.Parameter(torch.empty(num_experts, wide)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_dim))
        for matrix, form in self.forms.items():
            for part, (shape, dtype, trains) in form.parts(num_experts).items():
                name, tensor = f"delta_{matrix}_{part}", torch.empty(shape, dtype=dtype)
                self.register_parameter(name, nn.Parameter(tensor)) if trains else self.register_buffer(name, tensor)
        self.set_trainable(train_base, train_deltas)
        self.reset_parameters()

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of an expert's matrices: gate (where gated), up, down."""
        return MATRICES if self.gated else MATRICES[1:]

    @property
    def first_name(self) -> str:
        """Name of the base of what reads the input."""
        return "gate_up_proj" if self.gated else "up_proj"

    def matrix_shape(self, matrix: str) -> tuple[int, int]:
        """Outputs and inputs of "gate", "up" or "down"."""
        shape = (self.intermediate_dim, self.hidden_dim)
        return shape[::-1] if matrix == "down" else shape

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: expert ids [tokens, top_k]; ids from ``num_experts`` on are experts of other ranks: no output.
            top_k_weights: [tokens, top_k].
        """
        run = self._run if self.delta == "low_rank" and self.forward_path == "fused" else self._run_uncompiled
        dtype, kind = hidden_states.dtype, hidden_states.device.type
        if not torch.is_autocast_enabled(kind):
            return run(hidden_states, top_k_index, top_k_weights)
        # All products in autocast's dtype, and the sums in float32 all the same.
        with torch.autocast(kind, enabled=False):
            return run(hidden_states.to(torch.get_autocast_dtype(kind)), top_k_index, top_k_weights).to(dtype)

    def _run(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.forward_path == "fused":
            return fused(hidden, index, weights, self.experts())
        self._warn_of_lost_deltas(hidden.dtype)
        return materialised(hidden, index, weights, self.experts())

    def _warn_of_lost_deltas(self, dtype: torch.dtype) -> None:
        trained = any(p.requires_grad for name, p in self.named_parameters(recurse=False) if name.startswith("delta_"))
        if trained and torch.is_grad_enabled() and dtype.itemsize < 4:
            warnings.warn(
                f"forward_path='materialised' rounds base + delta to {dtype}, where small deltas vanish (1e-5 beside "
                "weights of 0.02: 85 % of the entries in bfloat16); train with forward_path='fused', or in float32",
                stacklevel=2,
            )

    # Its shapes depend on the routing: a compiler's graph would end within it, expert by expert.
    @torch.compiler.disable
    def _run_uncompiled(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self._run(hidden, index, weights)

    def experts(self) -> SharedBaseExperts:
        """The weights as the pure functions take them."""
        return SharedBaseExperts(
            first=getattr(self, self.first_name),
            down=self.down_proj,
            deltas=tuple(self.deltas(matrix) for matrix in self.matrices),
            act=self.act_fn,
            first_bias=getattr(self, f"{self.first_name}_bias") if self.has_bias else None,
            down_bias=self.down_proj_bias if self.has_bias else None,
            post_norm=self.post_norm,
            gates_on_input=self.gates_on_input,
        )

    def deltas(self, matrix: str) -> DeltaStack:
        """The deltas of "gate", "up" or "down"; ``deltas(matrix).delta(expert)`` is one code, to save or to measure."""
        if self.delta == "low_rank":
            return LowRankStack(self._part(matrix, "A"), self._part(matrix, "B"))
        form = self.forms[matrix]
        if self.delta == "quantized":
            return self._quantised(matrix, form.shape, self._part(matrix, "codes"))
        # Values of few bits are a matrix of one row.
        values = (
            self._part(matrix, "values")
            if form.bits is None
            else self._quantised(matrix, (1, form.num_kept), self._part(matrix, "codes")[:, None])
        )
        if self.stored_positions:
            return SparseStack(values, [FlatIndices(form.shape, each) for each in self._part(matrix, "positions")])
        # Read from the buffer, not from ``self.seed``: a checkpoint brings its own, and a rank holds some experts only.
        names = self._part(matrix, "stream").tolist()
        seeded = [SeededIndices(form.shape, MaskStream(*name), None, form.num_kept) for name in names]
        return SparseStack(values, seeded, self._hold(matrix, names, seeded) if self.hold_positions else None)

    def set_trainable(self, base: bool, deltas: bool) -> None:
        """Which parameters have gradients; an expert's biases go with its deltas."""
        own = {self.first_name, "down_proj"}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(base if name in own else deltas)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the base as ``nn.Linear`` draws its weight, zero the biases, and put the deltas to zero."""
        for name in (self.first_name, "down_proj"):
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))
            if self.has_bias:
                nn.init.zeros_(getattr(self, f"{name}_bias"))
        self.reset_deltas()

    @torch.no_grad()
    def reset_deltas(self) -> None:
        """Zero deltas, ready to train: A as LoRA draws it, B zero; values zero at the seed's positions; scales zero."""
        for matrix, form in self.forms.items():
            for part in form.parts(self.num_experts):
                tensor = self._part(matrix, part)
                if part == "A":
                    bound = 1 / math.sqrt(form.shape[1])
                    nn.init.uniform_(tensor, -bound, bound)
                elif part == "stream":
                    tensor.copy_(torch.tensor(self._streams(matrix)))
                elif part == "positions":
                    self._draw_positions(matrix, tensor)
                else:
                    nn.init.zeros_(tensor)

    def extra_repr(self) -> str:
        """Sizes and form."""
        numbers = {"rank": self.rank, "drop_rate": self.drop_rate, "bits": self.bits}
        given = ", ".join(f"{name}={number}" for name, number in numbers.items() if number is not None)
        return (
            f"hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, num_experts={self.num_experts}, "
            f"gated={self.gated}, bias={self.has_bias}, delta={self.delta!r}, {given}, "
            f"forward_path={self.forward_path!r}"
        )

    def _part(self, matrix: str, part: str) -> Tensor:
        return getattr(self, f"delta_{matrix}_{part}")

    def _quantised(self, matrix: str, shape: tuple[int, int], codes: Tensor) -> QuantizedStack:
        bits, scales = self.forms[matrix].bits, getattr(self, f"delta_{matrix}_scales", None)
        assert bits is not None
        if scales is not None and scales.ndim < codes.ndim:
            scales = scales[:, None]
        # What is decoded is cast to the work dtype where it is used; codes carry no dtype of their own.
        dtype = self.down_proj.dtype if scales is not None else codes.dtype
        return QuantizedStack(shape, bits, self.group_size, dtype, codes, scales)

    def _streams(self, matrix: str) -> list[list[int]]:
        """[num_experts][4] as ``SeededIndices.tensors`` stores one; saved, so that a file's masks are its own."""
        number = MATRICES.index(matrix)
        streams = [MaskStream(self.seed, self.layer, number, expert) for expert in range(self.num_experts)]
        return [[s.seed, s.layer, s.matrix, s.expert] for s in streams]

    def _draw_positions(self, matrix: str, positions: Tensor) -> None:
        if positions.is_meta:
            return
        form = self.forms[matrix]
        for row, name in zip(positions, self._streams(matrix), strict=True):
            seeded = SeededIndices(form.shape, MaskStream(*name), None, form.num_kept)
            row.copy_(seeded.positions(positions.device).sort().values)

    def _hold(self, matrix: str, names: list[list[int]], seeded: list[SeededIndices]) -> list[FlatIndices]:
        device = self.down_proj.device
        known, held = self._held.get(matrix, (None, []))
        if known != names or (held and held[0].flat.device != device):
            rows, cols = self.matrix_shape(matrix)
            width = torch.int32 if rows * cols <= 2**31 else torch.int64
            held = [FlatIndices((rows, cols), each.positions(device).to(width)) for each in seeded]
            self._held[matrix] = (names, held)
        return held


def _check_sizes(hidden_dim: int, intermediate_dim: int, num_experts: int, group_size: int) -> None:
    sizes = {"hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim}
    sizes |= {"num_experts": num_experts, "group_size": group_size}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r} ({type(size).__name__})")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _find_activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if not isinstance(act, str):
        return act
    from transformers.activations import ACT2FN

    if act not in ACT2FN:
        raise ValueError(f"act must be a name of Transformers' activations or a function, got {act!r}; try 'silu'")
    return ACT2FN[act]
