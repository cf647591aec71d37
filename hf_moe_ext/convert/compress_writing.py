"""The two readings of a compression: one that measures, one that encodes and writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_moe_ext.convert.checkpoint import CheckpointWriter
from hf_moe_ext.convert.compress_measure import (
    divide,
    give_back_memory,
    input_moments,
    mean_distance,
    measure_matrix,
    sample_rows,
    squared_output,
)
from hf_moe_ext.convert.compress_plan import CompressPlan
from hf_moe_ext.convert.compress_rates import Chosen, Measured, Place
from hf_moe_ext.convert.compress_report import CompressReport, MatrixReport
from hf_moe_ext.convert.delta_base import least_squares_base, mean_base
from hf_moe_ext.convert.delta_encoding import RANDOM_DROP, Encoding
from hf_moe_ext.convert.expert_layout import LAYER_PREFIX, stock_expert_name, stock_tensors
from hf_moe_ext.convert.expert_matrices import MATRICES, parent_name
from hf_moe_ext.ders.delta_state import stack_deltas
from hf_moe_ext.ops.delta_measures import form_delta, merge_out
from hf_moe_ext.ops.delta_positions import MaskStream


class LayerBases:
    """The base of each matrix, made when asked for; holds no weight.

    Args:
        plan: what is compressed.
        base: "parent", "mean" or "least_squares".
    """

    def __init__(self, plan: CompressPlan, base: str) -> None:
        self._plan, self._base = plan, base

    def start(self, layer: int, matrix: str) -> Tensor:
        """The parent's matrix or the experts' mean, in the type the experts are stored in."""
        experts = self._plan.experts
        if self._plan.parent is not None:
            return self._plan.parent.read(parent_name(layer, matrix)).to(experts.dtype(layer))
        return mean_base(partial(experts.read_all, layer, matrix)).to(experts.dtype(layer))

    def final(self, layer: int, matrix: str, encoding: Encoding) -> tuple[Tensor, float | None]:
        """The base that is stored, and its squared error after encoding over that of the mean, where it was fitted."""
        start = self.start(layer, matrix)
        if self._base != "least_squares":
            return start, None
        dtype = start.dtype

        def approximate(delta: Tensor, expert: int) -> Tensor:
            return encoding.encode(delta, MaskStream(0, layer, MATRICES.index(matrix), expert), dtype).decode()

        wide = torch.promote_types(dtype, torch.float32)
        experts = partial(self._plan.experts.read_all, layer, matrix)
        base, errors = least_squares_base(experts, start.to(wide), approximate, dtype)
        return base, divide(min(errors), errors[0])


def measure_all(
    plan: CompressPlan, bases: LayerBases, encodings: Mapping[str, Encoding], budgeted: bool, dry_run: bool
) -> dict[Place, Measured]:
    """Measure every matrix of every layer; with a budget, for a grid of encodings.

    Without, an error is predicted where that is cheap (a random drop's), or where nothing will be encoded.
    """
    measured: dict[Place, Measured] = {}
    for layer in plan.experts.layers:
        for matrix in MATRICES:
            encoding, shape = encodings[matrix], plan.experts.shapes[matrix]
            asked = encoding.grid(shape) if budgeted else [encoding]
            if not budgeted and not dry_run and (encoding.method != RANDOM_DROP or encoding.bits is not None):
                asked = []
            experts = partial(plan.experts.read_all, layer, matrix)
            measures = measure_matrix(
                layer, matrix, experts, plan.experts.num_experts, bases.start(layer, matrix),
                read_moments(plan, layer, matrix), asked,
            )  # fmt: skip
            give_back_memory()
            measured[layer, matrix] = Measured(measures, tuple(asked))
    return measured


def read_moments(plan: CompressPlan, layer: int, matrix: str) -> Tensor:
    """E[x_j^2] of a matrix's inputs as the norm before the block gives them."""
    name = f"{LAYER_PREFIX}{layer}.post_attention_layernorm.weight"
    gain = plan.reader.read(name) if matrix != "down" and name in plan.reader else None
    return input_moments(gain, plan.experts.shapes[matrix][1])


@dataclass(frozen=True, eq=False)
class CompressedWriter:
    """Encodes and writes the whole result, the experts of a layer one matrix of all of them at a time.

    Attributes:
        plan: what is compressed.
        bases: of its matrices.
        chosen: encoding of each matrix.
        writer: where to.
        report: whose rows are completed.
        seed: of random positions.
        export: "stock" for ordinary experts.
    """

    plan: CompressPlan
    bases: LayerBases
    chosen: Chosen
    writer: CheckpointWriter
    report: CompressReport
    seed: int
    export: str | None

    def write_all(self) -> None:
        """Tensor by tensor in the order of the source."""
        owner = {name: layer for layer in self.plan.experts.layers for name in self.plan.experts.names(layer)}
        rows = {(row.layer, row.matrix): row for row in self.report.matrices}
        done: set[int] = set()
        for name in self.plan.reader.names:
            layer = owner.get(name)
            if layer is None:
                self._write_unchanged(name)
            elif layer not in done:
                done.add(layer)
                self._write_layer(layer, rows)

    def _write_unchanged(self, name: str) -> None:
        plan, tensor = self.plan, self.plan.reader.read(name)
        if self.export is None:
            self.writer.write(name.replace(".block_sparse_moe.", ".mlp.", 1), tensor)
            return
        for stock_name, part in stock_tensors(name, tensor, plan.family) if plan.is_ext else ((name, tensor),):
            self.writer.write(stock_name, part)

    def _write_layer(self, layer: int, rows: Mapping[Place, MatrixReport]) -> None:
        prefix = f"{LAYER_PREFIX}{layer}.mlp.experts."
        first: Tensor | None = None
        for matrix in MATRICES:
            encoding = self.chosen.encodings[layer, matrix]
            base, ratio = self.bases.final(layer, matrix, encoding)
            if ratio is not None:
                self.report.base_errors[f"{layer}.{matrix}"] = ratio
            state = self._encode(layer, matrix, encoding, base, rows[layer, matrix])
            give_back_memory()
            if self.export is not None:
                continue
            while state:
                part, tensor = state.popitem()
                self.writer.write(f"{prefix}delta_{matrix}_{part}", tensor)
                del tensor
            if matrix == "gate":
                first = base
            elif matrix == "up":
                assert first is not None
                self.writer.write(f"{prefix}gate_up_proj", torch.cat([first, base]))
            else:
                self.writer.write(f"{prefix}down_proj", base)

    def _encode(
        self, layer: int, matrix: str, encoding: Encoding, base: Tensor, row: MatrixReport
    ) -> dict[str, Tensor]:
        """State of all experts' deltas, empty where ordinary experts are written; completes the row."""
        plan, samples, squared = self.plan, [], 0.0
        state: dict[str, Tensor] = {}
        moments = read_moments(plan, layer, matrix)
        num_experts = plan.experts.num_experts
        for number, expert in enumerate(plan.experts.read_all(layer, matrix)):
            stream = MaskStream(self.seed, layer, MATRICES.index(matrix), number)
            delta = form_delta(expert, base)
            code = encoding.encode(delta, stream, base.dtype)
            decoded = code.decode().to(delta.dtype)
            if self.export is not None:
                merged = merge_out(base, decoded, base.dtype)
                self.writer.write(stock_expert_name(layer, number, f"{matrix}_proj", plan.family), merged)
                decoded = form_delta(merged, base)
            else:
                # Straight into their place: a list of all codes and their stack would be the deltas twice.
                for part, tensor in stack_deltas([code]).items():
                    if number == 0:
                        state[part] = tensor.new_empty(num_experts, *tensor.shape[1:])
                    state[part][number] = tensor[0]
            samples.append(sample_rows(base, num_experts) + sample_rows(decoded, num_experts))
            error = squared_output(decoded.sub_(delta), moments)
            squared += divide(error, squared_output(expert, moments)) / num_experts
            del expert, delta, decoded, code
            give_back_memory()
        row.output_error, row.distance_after = squared**0.5, mean_distance(samples)
        return state
