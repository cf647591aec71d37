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
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AllReduceEP, EPImplementation, EPImplementationInterface

from hf_moe_ext.dcca.exchange import NAME, Exchange, ReturnRows, Route, SendRows
from hf_moe_ext.dcca.token_rows import group_received_pairs, group_sent_rows, plan_rows, sum_rows, take_rows


class LatentAllToAllEP(EPImplementation):
    """One row per (token, rank of its experts) each way, weighted and summed on the experts' rank.

    Selected with ``DistributedConfig(..., ep_implementation="latent_all_to_all")``; for any block whose experts take
    (hidden_states, top_k_index, top_k_weights), with any `experts_implementation`. The experts run on (row, expert)
    pairs, one local id each, as under ``all_to_all``: several ids per row would need a filler for each rank's share of
    a token's top-k, which every backend gathers and some multiply (2.0 to 2.7 times the time of the experts at top-8 of 64 on
    four ranks), and which the experts' loops of some models do not skip.

    At inference on a batch that the ranks share (`ep_size == tp_size`) it is Transformers' ``all_reduce``: every rank
    has the tokens already, one collective of the outputs replaces five, and no size is read back, so decoding can be
    captured in a CUDA graph (not with eager experts). ``ep_implementation="all_to_all"`` exchanges there too.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts_per_rank: int = experts.num_experts
        self.config = getattr(experts, "config", None)
        self.all_reduce: Any = AllReduceEP(experts, ep_mesh, tp_mesh) if self.shares_batch else None
        self.layer = _name_layer(self.config)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted expert outputs of this rank's tokens.

        Args:
            hidden_states: [tokens, width]
            top_k_index: [tokens, top_k], int64, global expert ids
            top_k_weights: [tokens, top_k], of any floating-point type

        Raises:
            RuntimeError: an exchange failed: names the layer and the exchange.
        """
        if self._can_all_reduce(hidden_states, top_k_weights):
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
        shape = torch.Size((num_tokens, output.size(1)))
        chunks = DTensor.from_local(
            output.contiguous(), self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        )
        return chunks.full_tensor()

    def _can_all_reduce(self, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
        if not self.shares_batch or (
            torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        ):
            return False
        # It masks other ranks' choices with an id that the loop of some eager experts takes for an expert (NemotronH).
        return getattr(self.config, "_experts_implementation", "eager") != "eager"

    def _exchange(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        plan = plan_rows(top_k_index, self.experts_per_rank, self.ep_mesh.size())
        route = self._exchange_counts(plan.counts)
        tokens = group_sent_rows(plan.needed, sum(route.send_rows))
        pairs = plan.pair_order[: sum(route.send_pairs)]
        rows, weights, codes = SendRows.apply(
            take_rows(hidden_states, tokens),
            top_k_weights.reshape(-1).index_select(0, pairs),
            plan.codes.index_select(0, pairs),
            route,
        )
        return sum_rows(ReturnRows.apply(self._run_experts(rows, weights, codes, route), route), tokens)

    def _exchange_counts(self, counts: Tensor) -> Route:
        """Every rank's rows and pairs for every other; the one host sync of the layer."""
        group, ones = self.ep_mesh.get_group(), [1] * self.ep_mesh.size()
        route = Route(group, self.layer, ones, ones, ones, ones)
        received = Exchange(counts, ones, ones, route, "counts").wait()
        sizes = torch.cat([counts, received], dim=1).t().tolist()
        return Route(group, self.layer, sizes[0], sizes[2], sizes[1], sizes[3])

    def _run_experts(self, rows: Tensor, weights: Tensor, codes: Tensor, route: Route) -> Tensor:
        """This rank's experts on the received rows: weighted sums per row. [rows received, width]."""
        if not rows.size(0):
            # A row of nothing through expert 0, so that the way back and FSDP's reduction of the experts run here too.
            dummy = rows.sum(dim=0, keepdim=True)
            return self.experts_forward(dummy, codes.new_zeros(1, 1), weights.new_ones(1, 1))[:0]
        pairs = group_received_pairs(codes // self.experts_per_rank, route.receive_rows, route.receive_pairs)
        ids = (codes % self.experts_per_rank).unsqueeze(1)
        return sum_rows(self.experts_forward(take_rows(rows, pairs), ids, weights.unsqueeze(1)), pairs)


_num_layers: dict[int, int] = {}  # by id of a model's config, which is not hashable


def _name_layer(config: Any) -> str:
    """A layer's place among the MoE layers of its model, as the plan is applied to them in order."""
    if config is None:
        return "an MoE layer"
    if id(config) not in _num_layers:
        _num_layers[id(config)] = 0
        weakref.finalize(config, _num_layers.pop, id(config), None)
    _num_layers[id(config)] += 1
    return f"MoE layer {_num_layers[id(config)] - 1} (the MoE layers counted from 0)"


if NAME not in EPImplementationInterface():
    EPImplementationInterface.register(NAME, LatentAllToAllEP)
