"""The experts' matrices of a checkpoint one at a time, and the dense parent's, wherever they are stored.

| checkpoint | gate, up, down of expert N |
|---|---|
| stock Mixtral | ``block_sparse_moe.experts.N.w1.weight``, ``w3``, ``w2`` |
| stock OLMoE, Qwen3-MoE | ``mlp.experts.N.gate_proj.weight``, ``up_proj``, ``down_proj`` |
| ``*_ext`` | ``mlp.experts.gate_up_proj`` [experts, 2 inner, hidden] and ``down_proj`` [experts, hidden, inner] |
| dense parent | ``mlp.gate_proj.weight``, ``up_proj``, ``down_proj`` |
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_moe_ext.convert.expert_layout import LAYER_PREFIX
from hf_moe_ext.convert.streaming_reader import StreamingReader

MATRICES = ("gate", "up", "down")
_SINGLE = re.compile(
    rf"{re.escape(LAYER_PREFIX)}(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight"
)
_STACKED = re.compile(rf"{re.escape(LAYER_PREFIX)}(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


class ExpertMatrices:
    """Reads ``(layer, matrix, expert)`` of a MoE checkpoint; holds no weight.

    Attributes:
        num_experts: of every layer.
        layers: decoder layers whose experts are here, ascending.
        shapes: matrix -> rows and columns.
    """

    def __init__(self, reader: StreamingReader, num_experts: int, inner_size: int, hidden_size: int,
                 layers: list[int] | None = None) -> None:  # fmt: skip
        """Find them all.

        Args:
            reader: the checkpoint.
            num_experts: of a layer.
            inner_size: inner width of an expert.
            hidden_size: width of the model.
            layers: those of interest; None: every layer that has experts.

        Raises:
            ValueError: no experts in a layer of interest, one that lacks a matrix, another shape, or quantised weights.
        """
        self.reader, self.num_experts = reader, num_experts
        self.shapes = {
            "gate": (inner_size, hidden_size),
            "up": (inner_size, hidden_size),
            "down": (hidden_size, inner_size),
        }
        self._single: dict[tuple[int, str, int], str] = {}
        self._stacked: dict[tuple[int, str], str] = {}
        for name in reader.names:
            if found := _SINGLE.fullmatch(name):
                self._single[int(found[1]), _ROLES[found[3]], int(found[2])] = name
            elif found := _STACKED.fullmatch(name):
                self._stacked[int(found[1]), found[2]] = name
        present: list[int] = sorted({key[0] for key in self._single} | {key[0] for key in self._stacked})
        self.layers = present if layers is None else [layer for layer in present if layer in layers]
        if lacking := [layer for layer in layers or () if layer not in present]:
            raise ValueError(
                f"layer {lacking[0]} of {reader.folder} has no experts' matrices (mlp.experts.*), though its config.json says "
                "it has experts; the checkpoint is incomplete, download it again"
            )
        if not self.layers:
            raise ValueError(f"checkpoint {reader.folder} has no experts' matrices (mlp.experts.*) to compress")
        for layer in self.layers:
            self._check(layer)

    def names(self, layer: int) -> list[str]:
        """Names of the tensors that hold a layer's experts."""
        single = [name for key, name in self._single.items() if key[0] == layer]
        return single + [name for key, name in self._stacked.items() if key[0] == layer]

    def dtype(self, layer: int) -> torch.dtype:
        """What a layer's experts are stored as."""
        return self.reader.places[self.names(layer)[0]].dtype

    def read_all(self, layer: int, matrix: str) -> Iterator[Tensor]:
        """The matrix of each expert in turn."""
        for expert in range(self.num_experts):
            yield self.read(layer, matrix, expert)

    def read(self, layer: int, matrix: str, expert: int) -> Tensor:
        """One matrix [rows, cols], in the type it is stored in, in memory of its own."""
        if name := self._single.get((layer, matrix, expert)):
            return self.reader.read(name)
        rows = self.shapes[matrix][0]
        start = rows if matrix == "up" else 0
        name = self._stacked[layer, "down_proj" if matrix == "down" else "gate_up_proj"]
        return self.reader.read_expert(name, expert, start, start + rows)

    def stack_bytes(self) -> int:
        """Bytes of the largest stack of experts' matrices: as stored, or, stored one by one, of one matrix of all experts."""
        places = self.reader.places
        stacked = [places[name].num_bytes for name in self._stacked.values()]
        single = [places[name].num_bytes * self.num_experts for name in self._single.values()]
        return max([*stacked, *single])

    def _check(self, layer: int) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        if any(key[0] == layer for key in self._stacked):
            for role, matrix, factor in (("gate_up_proj", "gate", 2), ("down_proj", "down", 1)):
                rows, cols = self.shapes[matrix]
                wanted[self._find(self._stacked, (layer, role))] = (self.num_experts, factor * rows, cols)
        else:
            for matrix, shape in self.shapes.items():
                for expert in range(self.num_experts):
                    wanted[self._find(self._single, (layer, matrix, expert))] = shape
        if len(wanted) != len(self.names(layer)):
            raise ValueError(
                f"layer {layer} of {self.reader.folder} holds {len(self.names(layer))} matrices of experts, but its "
                f"config.json says {self.num_experts} experts ({len(wanted)} matrices)"
            )
        for name, expected in wanted.items():
            place = self.reader.places[name]
            if place.shape != expected:
                raise ValueError(f"{name} is {place.shape} in {self.reader.folder}, its config.json says {expected}")
            if not place.dtype.is_floating_point or place.dtype.itemsize < 2:
                raise ValueError(
                    f"checkpoint {self.reader.folder}: {name} is stored as {place.dtype}, so it is quantised; compress the "
                    "checkpoint in full precision it was made from"
                )

    def _find(self, names: dict, key: tuple) -> str:
        if key not in names:
            raise ValueError(
                f"layer {key[0]} of {self.reader.folder} has no {' of expert '.join(map(str, key[1:]))}; the checkpoint is "
                "incomplete, download it again"
            )
        return names[key]


def parent_name(layer: int, matrix: str) -> str:
    """Name of a dense parent's matrix."""
    return f"{LAYER_PREFIX}{layer}.mlp.{matrix}_proj.weight"
