"""Which row goes where: from routing to rows per rank, and from received rows to rows per expert."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """What one rank sends, computed from its routing alone.

    Attributes:
        needed: [tokens, ranks], bool. Whether a token has an expert on a rank: one row travels for each True.
        codes: [tokens * top_k]. Number of the token's row within its rank's block, times the experts per rank, plus
            the local expert id.
        pair_order: [tokens * top_k]. The (token, choice) pairs by rank, then token; those of no rank last.
        counts: [ranks, 2], int64. Rows and pairs for each rank.
    """

    needed: Tensor
    codes: Tensor
    pair_order: Tensor
    counts: Tensor


class Groups(NamedTuple):
    """Which rows of a tensor belong to which group: rows are taken from groups, and summed into them.

    Attributes:
        group: [rows], int64. The group of each row.
        order: [rows], int64. The rows by group.
        starts: [groups], int64. Where each group begins in `order`.
    """

    group: Tensor
    order: Tensor
    starts: Tensor


def plan_rows(top_k_index: Tensor, num_local_experts: int, num_ranks: int) -> Plan:
    """Which token goes to which rank.

    Args:
        top_k_index: [tokens, top_k], int64. Global expert ids, distinct within a token; an id outside the experts is
            nobody's and is not sent.
        num_local_experts: experts on each rank; rank p holds those from p * num_local_experts.
        num_ranks: ranks of the expert-parallel group.
    """
    num_tokens = top_k_index.size(0)
    known = (top_k_index >= 0) & (top_k_index < num_local_experts * num_ranks)
    owner = torch.where(known, top_k_index // num_local_experts, num_ranks)
    needed = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=owner.device)
    needed = needed.scatter_(1, owner, True)[:, :num_ranks]
    row_of_block = needed.cumsum(0).sub_(1).gather(1, owner.clamp(max=num_ranks - 1))
    flat = owner.reshape(-1)
    pairs = torch.zeros(num_ranks + 1, dtype=torch.long, device=owner.device)
    pairs = pairs.scatter_add_(0, flat, torch.ones_like(flat))[:num_ranks]
    return Plan(
        needed=needed,
        codes=(row_of_block * num_local_experts + top_k_index % num_local_experts).reshape(-1),
        pair_order=torch.argsort(flat, stable=True),
        counts=torch.stack([needed.sum(0), pairs], dim=1),
    )


def group_sent_rows(needed: Tensor, num_rows: int) -> Groups:
    """The token of each row this rank sends, rows ordered by rank, then token.

    Args:
        needed: [tokens, ranks], see `Plan`.
        num_rows: how many are True; given, so that the device need not be asked.
    """
    token = needed.t().contiguous().nonzero_static(size=num_rows)[:, 1]
    per_token = needed.sum(1)
    return Groups(token, torch.argsort(token, stable=True), per_token.cumsum(0).sub_(per_token))


def group_received_pairs(row_codes: Tensor, receive_rows: list[int], receive_pairs: list[int]) -> Groups:
    """The received row of each received (row, expert) pair.

    Args:
        row_codes: [pairs], number of the row within its sender's block.
        receive_rows: rows by sender.
        receive_pairs: pairs by sender.
    """
    device = row_codes.device
    rows, pairs = torch.tensor([receive_rows, receive_pairs], device=device)
    row = row_codes + (rows.cumsum(0) - rows).repeat_interleave(pairs, output_size=sum(receive_pairs))
    per_row = torch.zeros(sum(receive_rows), dtype=torch.long, device=device).scatter_add_(0, row, torch.ones_like(row))
    # A sender orders its pairs by token, so they arrive by row already.
    return Groups(row, torch.arange(row.numel(), device=device), per_row.cumsum(0).sub_(per_row))


def take_rows(rows: Tensor, groups: Groups) -> Tensor:
    """``rows[groups.group]``; backward sums by group. [groups, width] -> [rows, width]."""
    return _Take.apply(rows, *groups)


def sum_rows(rows: Tensor, groups: Groups) -> Tensor:
    """Sum by group, at least in float32; backward takes. [rows, width] -> [groups, width]."""
    return _Sum.apply(rows, *groups)


def _take(rows: Tensor, group: Tensor) -> Tensor:
    return rows.index_select(0, group)


def _sum(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    if not order.numel() or not starts.numel():
        return rows.new_zeros(starts.numel(), rows.size(1))
    # Sums each group in order and in float32 for half precision: deterministic on every device, unlike `index_add_`.
    return torch.embedding_bag(rows.contiguous(), order, starts)[0]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(order, starts)
        return _take(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad, *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Tensor, order: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(group)
        return _sum(rows, order, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _take(grad, *ctx.saved_tensors), None, None, None
