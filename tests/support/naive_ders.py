"""Slow twin of experts with a shared base: one token and one choice at a time, in float64, as the definition reads.

``y = sum_n w[t, n] E_i(h_t)`` with ``i = index[t, n]`` and every matrix of E_i written out as ``W + D_i``.
Source: DeRS, arXiv 2503.01359, section 3.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from support.naive_deltas import unpacked_code


def low_rank_matrices(A: Tensor, B: Tensor) -> list[Tensor]:
    """``D_i = B_i A_i`` of A [N, r, in], B [N, out, r]."""
    return [B[i].double() @ A[i].double() for i in range(A.shape[0])]


def sparse_matrices(values: Tensor, positions: Sequence[Sequence[int]], shape: tuple[int, int]) -> list[Tensor]:
    """``D_i`` [out, in] with ``values[i, j]`` at row-major position ``positions[i][j]``, entry by entry."""
    matrices = []
    for i, places in enumerate(positions):
        entries = [torch.zeros((), dtype=torch.float64)] * (shape[0] * shape[1])
        for j, place in enumerate(places):
            entries[place] = values[i, j].double()
        matrices.append(torch.stack(entries).view(shape))
    return matrices


def grid_values(codes: Tensor, scales: Tensor | None, bits: int, group_size: int, width: int) -> Tensor:
    """Numbers [..., width] of packed codes [..., bytes], one by one: (code - middle of the grid) times the group's scale."""
    if scales is None:
        return codes.double()
    rows = []
    for row, row_scales in zip(codes.flatten(0, -2).tolist(), scales.double().flatten(0, -2).tolist(), strict=True):
        levels = [unpacked_code(row, bits, j) - (2**bits - 1) / 2 for j in range(width)]
        rows.append([level * row_scales[j // group_size] for j, level in enumerate(levels)])
    return torch.tensor(rows, dtype=torch.float64).view(*codes.shape[:-1], width)


def shared_base_experts(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Sequence[Tensor]],
    biases: Mapping[str, Tensor],
    act: Callable[[Tensor], Tensor],
    post_norm: Callable[[Tensor], Tensor] | None = None,
    gates_on_input: bool = False,
) -> Tensor:
    """Output of the layer's experts, [tokens, hidden], float64.

    Args:
        hidden: [tokens, hidden].
        index: [tokens, top_k]; an id outside 0..N-1 adds nothing.
        weights: [tokens, top_k].
        base: "gate" (gated experts only), "up" [inner, hidden] and "down" [hidden, inner].
        deltas: of the same names, N matrices each.
        biases: of the same names, [N, out] each; empty without.
        act: on the gate; of un-gated experts on up.
        post_norm: on an expert's output.
        gates_on_input: weights multiply an expert's input in the place of its output.
    """
    num_experts = len(deltas["up"])

    def project(name: str, i: int, row: Tensor) -> Tensor:
        result = (base[name].double() + deltas[name][i].double()) @ row
        return result + biases[name][i].double() if name in biases else result

    rows = []
    for t, h in enumerate(hidden.double()):
        row = 0 * h
        for n in range(index.shape[1]):
            i = int(index[t, n])
            if 0 <= i < num_experts:
                gate = weights[t, n].double()
                x = gate * h if gates_on_input else h
                up = project("up", i, x)
                inner = act(project("gate", i, x)) * up if "gate" in base else act(up)
                output = project("down", i, inner)
                output = output if post_norm is None else post_norm(output)
                row = row + (output if gates_on_input else gate * output)
        rows.append(row)
    return torch.stack(rows)
