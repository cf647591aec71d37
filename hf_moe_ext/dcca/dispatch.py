"""Expert-parallel dispatch that sends a token once to each rank that holds some of its experts.

The stock ``all_to_all`` sends one row per (token, expert) and gets one back. Here a token goes once per destination
rank; that rank runs its experts, weighs and sums their outputs in the width of the experts, and one row per (token,
destination) returns. The sum is linear, as is what follows the experts (an ascend projection, a residual), so the
result is the same and only rounding differs.

Collectives of one layer, on the expert-parallel group (stock: 3 forward, 2 backward):

| exchange | per          | what                                                                        |
|----------|--------------|-----------------------------------------------------------------------------|
| counts   | rank pair    | rows and (row, expert) pairs to expect, int64; read back in the one host sync |
| metadata | pair         | which expert of which row, and the routing weight; runs beside the payload  |
| payload  | row          | the hidden states                                                           |
| return   | row          | weighted sums of expert outputs                                             |

and backward: return and payload once each, and the gradients of the routing weights beside the payload's.

Whoever registers another dispatcher may read this one as an example: only `EPImplementation` is Transformers' own.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AllReduceEP, EPImplementation, EPImplementationInterface

NAME = "latent_all_to_all"


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


class Route(NamedTuple):
    """The sizes of a layer's exchanges: what this rank sends to and receives from each rank of the group."""

    group: Any
    layer: str
    send_rows: list[int]
    receive_rows: list[int]
    send_pairs: list[int]
    receive_pairs: list[int]


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


class _Exchange:
    """An all-to-all under way."""

    def __init__(self, rows: Tensor, receive: list[int], send: list[int], route: Route, what: str) -> None:
        self.rows, self.route, self.what = rows.contiguous(), route, what  # kept until they have been sent
        self.received = rows.new_empty(sum(receive), *rows.shape[1:])
        with _explained(route.layer, what, route.group):
            self.work = distributed.all_to_all_single(
                self.received, self.rows, receive, send, group=route.group, async_op=True
            )

    def wait(self) -> Tensor:
        with _explained(self.route.layer, self.what, self.route.group):
            self.work.wait()
        return self.received


@contextmanager
def _explained(layer: str, what: str, group: Any) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        late = "timed out" in reason.lower() or "timeout" in reason.lower()
        cause, step = (
            ("did not answer in time", "raise `ddp_timeout` if that process is only slow, else ")
            if late
            else ("ended or closed its connection", "")
        )
        raise RuntimeError(
            f"{NAME}: the {what} exchange of {layer} failed on rank {group.rank()} of the {group.size()} that share its "
            f"experts, because another rank {cause}; {step}look for the first error in the other ranks' logs and resume "
            f"from the last checkpoint. The backend said: {reason}"
        ) from error


class _Send(torch.autograd.Function):
    """Rows and metadata to the ranks of their experts, both exchanges in flight together; backward returns gradients.

    Inputs: rows [rows sent, width], weights [pairs sent], codes [pairs sent]. Outputs: the same as received.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, codes: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.weights_dtype = route, weights.dtype
        bits = _as_integers(weights)
        metadata = torch.stack([codes.to(bits.dtype), bits], dim=1)
        pending_metadata = _Exchange(metadata, route.receive_pairs, route.send_pairs, route, "metadata")
        pending_rows = _Exchange(rows, route.receive_rows, route.send_rows, route, "payload")
        codes, bits = pending_metadata.wait().unbind(1)
        codes = codes.long()
        ctx.mark_non_differentiable(codes)
        return pending_rows.wait(), _from_integers(bits, weights.dtype), codes

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Any, ...]:
        route, pending = ctx.route, [None, None]
        if ctx.needs_input_grad[1]:
            bits = _as_integers(grad_weights)
            pending[1] = _Exchange(bits, route.send_pairs, route.receive_pairs, route, "backward metadata")
        if ctx.needs_input_grad[0]:
            pending[0] = _Exchange(grad_rows, route.send_rows, route.receive_rows, route, "backward payload")
        rows, weights = (exchange.wait() if exchange is not None else None for exchange in pending)
        return rows, None if weights is None else _from_integers(weights, ctx.weights_dtype), None, None


class _Return(torch.autograd.Function):
    """Rows back to the ranks that sent them; backward sends."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _Exchange(rows, route.send_rows, route.receive_rows, route, "return").wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        return _Exchange(grad, route.receive_rows, route.send_rows, route, "backward return").wait(), None


def _as_integers(weights: Tensor) -> Tensor:
    """The bits of routing weights, so that they share an exchange with integers: int32, or int64 for float64."""
    if weights.dtype == torch.float64:
        return weights.contiguous().view(torch.int64)
    return weights.float().contiguous().view(torch.int32)


def _from_integers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.contiguous().view(torch.float64 if bits.dtype == torch.int64 else torch.float32).to(dtype)


class LatentAllToAllEP(EPImplementation):
    """One row per (token, rank of its experts) each way, weighted and summed on the experts' rank.

    Selected with ``DistributedConfig(..., ep_implementation="latent_all_to_all")``; for any block whose experts take
    (hidden_states, top_k_index, top_k_weights), with any `experts_implementation`. The experts run on (row, expert)
    pairs, one local id each, as under ``all_to_all``: several ids per row would need a filler for each rank's share of
    a token's top-k, which every backend gathers and some multiply (2.0 to 2.7 times the time of the experts at top-8 of 64 on
    four ranks), and which the experts' loops of some models do not skip.

    At inference on a batch that the ranks share (`ep_size == tp_size`) it is Transformers' ``all_reduce``: every rank
    has the tokens already, one collective of the outputs replaces five, and no size is read back, so decoding can be
    captured in a CUDA graph. ``ep_implementation="all_to_all"`` exchanges there too.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.all_reduce = AllReduceEP(experts, ep_mesh, tp_mesh) if self.shares_batch else None
        self.layer = _name_layer(experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted expert outputs of this rank's tokens.

        Args:
            hidden_states: [tokens, width]
            top_k_index: [tokens, top_k], int64, global expert ids
            top_k_weights: [tokens, top_k], of any floating-point type

        Raises:
            RuntimeError: an exchange failed: names the layer and the exchange.
        """
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if self.all_reduce is not None and not trains:
            return self.all_reduce(hidden_states, top_k_index, top_k_weights)
        num_tokens = hidden_states.size(0)
        if self.tp_mesh.size() > 1:
            # A local chunk of what the ranks share; its backward gathers the gradients of all chunks.
            hidden_states, top_k_index, top_k_weights = (
                DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
                .redistribute(self.tp_mesh, [Shard(0)])
                .to_local()
                for tensor in (hidden_states, top_k_index, top_k_weights)
            )
        output = self._exchange(hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() == 1:
            return output
        shape = (num_tokens, output.size(1))
        chunks = DTensor.from_local(
            output.contiguous(), self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        )
        return chunks.full_tensor()

    def _exchange(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        plan = plan_rows(top_k_index, self.num_local_experts, self.ep_mesh.size())
        route = self._exchange_counts(plan.counts)
        tokens = group_sent_rows(plan.needed, sum(route.send_rows))
        pairs = plan.pair_order[: sum(route.send_pairs)]
        rows, weights, codes = _Send.apply(
            take_rows(hidden_states, tokens),
            top_k_weights.reshape(-1).index_select(0, pairs),
            plan.codes.index_select(0, pairs),
            route,
        )
        return sum_rows(_Return.apply(self._run_experts(rows, weights, codes, route), route), tokens)

    def _exchange_counts(self, counts: Tensor) -> Route:
        """Every rank's rows and pairs for every other; the one host sync of the layer."""
        group, ones = self.ep_mesh.get_group(), [1] * self.ep_mesh.size()
        route = Route(group, self.layer, ones, ones, ones, ones)
        received = _Exchange(counts, ones, ones, route, "counts").wait()
        sizes = torch.cat([counts, received], dim=1).t().tolist()
        return Route(group, self.layer, sizes[0], sizes[2], sizes[1], sizes[3])

    def _run_experts(self, rows: Tensor, weights: Tensor, codes: Tensor, route: Route) -> Tensor:
        """This rank's experts on the received rows: weighted sums per row. [rows received, width]."""
        if not rows.size(0):
            # A row of nothing through expert 0, so that the way back and FSDP's reduction of the experts run here too.
            dummy = rows.sum(dim=0, keepdim=True)
            return self.experts_forward(dummy, codes.new_zeros(1, 1), weights.new_ones(1, 1))[:0]
        pairs = group_received_pairs(codes // self.num_local_experts, route.receive_rows, route.receive_pairs)
        ids = (codes % self.num_local_experts).unsqueeze(1)
        return sum_rows(self.experts_forward(take_rows(rows, pairs), ids, weights.unsqueeze(1)), pairs)


_num_layers: dict[int, int] = {}  # by id of a model's config, which is not hashable


def _name_layer(experts: Any) -> str:
    """A layer's place among the MoE layers of its model, as the plan is applied to them in order."""
    config = getattr(experts, "config", None)
    if config is None:
        return "an MoE layer"
    if id(config) not in _num_layers:
        _num_layers[id(config)] = 0
        weakref.finalize(config, _num_layers.pop, id(config), None)
    _num_layers[id(config)] += 1
    return f"MoE layer {_num_layers[id(config)] - 1} (the MoE layers counted from 0)"


if NAME not in EPImplementationInterface():
    EPImplementationInterface.register(NAME, LatentAllToAllEP)
