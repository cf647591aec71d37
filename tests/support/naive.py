"""Slow twins of the adapter mathematics: one token at a time, in float64, to be checked by eye.

Every function is written as the sum it stands for, with Python loops over layers, tokens and choices. Nothing is
sorted, grouped, gathered or batched, and gradients come from ordinary autograd. A fast path is right when its output
and every gradient equal those of its twin here.

| symbol   | here                | meaning                                                            |
|----------|---------------------|--------------------------------------------------------------------|
| h        | `h`                 | input of the block for one token, after the norm, [hidden]         |
| A_i, B_i | `A_i`, `B_i`        | down and up projection of adapter i, [r, hidden], [hidden, r]      |
| s        | `scale`             | lora_alpha / r                                                     |
| M, N     | `A.shape[0]`, `top_k` | adapters per layer, active adapters per token                    |
| W~, p~   | `router_weight`, `probs` | the adapters' own router and its softmax over all M           |

Source: PERFT, arXiv 2411.08212 (variants R, E, D, S) and its public code for the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def adapter_delta(h: Tensor, A_i: Tensor, B_i: Tensor, *, scale: float, kind: str) -> Tensor:
    """What one adapter adds for one token.

    Args:
        h: Block input of one token, [hidden].
        A_i: Down projection, [r, hidden].
        B_i: Up projection, [hidden, r].
        scale: lora_alpha / r; the parallel adapter has none, so it must be 1 there.
        kind: "lora": `scale * B_i (A_i h)`; "parallel": `B_i SiLU(A_i h)`.

    Returns:
        The delta, [hidden], float64.

    Raises:
        ValueError: On another kind, or a parallel adapter with a scale.
    """
    down = A_i.double() @ h.double()
    if kind == "lora":
        return scale * (B_i.double() @ down)
    if kind == "parallel":
        if scale != 1:
            raise ValueError(f"a parallel adapter has scale 1, got {scale}")
        return B_i.double() @ (down / (1 + torch.exp(-down)))
    raise ValueError(f"kind must be 'lora' or 'parallel', got {kind!r}")


def routed_adapter(
    hidden: Tensor, index: Tensor | None, weights: Tensor | None, A: Tensor, B: Tensor, *, scale: float, kind: str
) -> Tensor:
    """`sum_n weights[t, n] * delta of adapter index[t, n]` for each token t.

    Args:
        hidden: [tokens, hidden].
        index: Chosen adapters, [tokens, k]; an id outside 0..M-1 is a sentinel and adds nothing.
            None means all M adapters, each with weight 1 (variants D and S).
        weights: [tokens, k], or None together with `index`.
        A: [M, r, hidden].
        B: [M, hidden, r].
        scale: See `adapter_delta`.
        kind: See `adapter_delta`.

    Returns:
        [tokens, hidden], float64.
    """
    if (index is None) != (weights is None):
        raise ValueError("give both index and weights, or neither")
    num_adapters = A.shape[0]
    rows = []
    for token, h in enumerate(hidden.double()):
        # `0 * h` keeps the row in the graph of `hidden` when all its ids are sentinels.
        row = 0 * h
        if index is None:
            for i in range(num_adapters):
                row = row + adapter_delta(h, A[i], B[i], scale=scale, kind=kind)
        else:
            for n in range(index.shape[1]):
                i = int(index[token, n])
                if 0 <= i < num_adapters:
                    weight = weights[token, n].double()
                    row = row + weight * adapter_delta(h, A[i], B[i], scale=scale, kind=kind)
        rows.append(row)
    return torch.stack(rows) if rows else hidden.double().clone()


def softmax(logits: Tensor) -> Tensor:
    """Softmax of one vector; the largest logit is subtracted so that nothing overflows."""
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def largest(values: Tensor, count: int) -> list[int]:
    """Positions of the `count` largest entries of a vector, largest first, equal entries in order of position."""
    numbers = values.detach().tolist()
    return sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:count]


def route(hidden: Tensor, router_weight: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Router of variant R: softmax over all M adapters first, then the top k of it.

    Args:
        hidden: [tokens, hidden].
        router_weight: [M, hidden].
        top_k: Adapters per token.
        normalize: Divide the chosen probabilities by their sum.

    Returns:
        probs [tokens, M], index [tokens, top_k] (ties go to the lowest id), weights [tokens, top_k]; float64.
    """
    probs, index, weights = [], [], []
    for h in hidden.double():
        p = softmax(router_weight.double() @ h)
        chosen = largest(p, top_k)
        w = torch.stack([p[i] for i in chosen])
        probs.append(p)
        index.append(chosen)
        weights.append(w / w.sum() if normalize else w)
    return torch.stack(probs), torch.tensor(index), torch.stack(weights)


def load_balance_loss(probs_per_layer: Sequence[Tensor], index_per_layer: Sequence[Tensor], mask: Tensor) -> Tensor:
    """`M * sum_k sum_i f[k, i] P[i]`, all layers pooled before the product, padding left out.

    f[k, i] is the share of (layer, token) pairs whose k-th choice is i (a count: no gradient), P[i] the mean
    probability of i over the same pairs. The value is N = top_k, not 1, when the load is even.

    Args:
        probs_per_layer: For each layer, [tokens, M].
        index_per_layer: For each layer, [tokens, N].
        mask: [tokens], True on tokens that count.

    Returns:
        Scalar, float64; 0 when no token counts.
    """
    num_experts = probs_per_layer[0].shape[1]
    num_choices = index_per_layer[0].shape[1]
    chosen = [[0] * num_experts for _ in range(num_choices)]
    prob_sum = [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]
    pairs = 0
    for probs, index in zip(probs_per_layer, index_per_layer, strict=True):
        for token in range(len(mask)):
            if not bool(mask[token]):
                continue
            pairs += 1
            for k in range(num_choices):
                i = int(index[token, k])
                if 0 <= i < num_experts:  # a sentinel must not count for the last expert through Python's [-1]
                    chosen[k][i] += 1
            for i in range(num_experts):
                prob_sum[i] = prob_sum[i] + probs[token, i].double()
    loss = torch.zeros((), dtype=torch.float64)
    for k in range(num_choices):
        for i in range(num_experts):
            if pairs:
                loss = loss + num_experts * (chosen[k][i] / pairs) * (prob_sum[i] / pairs)
    return loss


def scoped_auxiliary(
    routed: Sequence[tuple[Tensor, Tensor, Tensor]],
    sequences: Sequence[int],
    scope: str,
    load_balance: float,
    z: float,
    last_load: Sequence[Sequence[float]] | None = None,
) -> list[Tensor]:
    """The weighted auxiliary loss of each sequence of one batch.

    "batch": what all tokens and layers make together, the same for every sequence. "sequence": each sequence in each
    layer by itself, the mean over layers. "global": the same with the load of a step before in place of the sequence's.

    Args:
        routed: For each layer, probabilities [tokens, M], chosen [tokens, N], logits [tokens, M].
        sequences: For each token, the number of its sequence, or -1 for padding.
        scope: "batch", "sequence" or "global".
        load_balance: Weight of the load-balance loss.
        z: Weight of the z-loss.
        last_load: For each layer, the share of tokens that chose each expert; None: 1/M each.
    """
    values = []
    for sequence in range(max(sequences) + 1):
        if scope == "batch":
            everything = torch.tensor([s >= 0 for s in sequences])
            probs, index, logits = (list(part) for part in zip(*routed, strict=True))
            value = load_balance * load_balance_loss(probs, index, everything) + z * router_z_loss(logits, everything)
            values.append(value)
            continue
        inside = torch.tensor([s == sequence for s in sequences])
        value = torch.zeros((), dtype=torch.float64)
        for layer, (probs, index, logits) in enumerate(routed):
            num_experts = probs.shape[1]
            if scope == "sequence":
                balance = load_balance_loss([probs], [index], inside)
            else:
                load = [1 / num_experts] * num_experts if last_load is None else last_load[layer]
                balance = torch.zeros((), dtype=torch.float64)
                for i in range(num_experts):
                    balance = balance + num_experts * load[i] * probs[inside, i].double().mean()
            value = value + (load_balance * balance + z * router_z_loss([logits], inside)) / len(routed)
        values.append(value)
    return values


def shares_of_experts(index: Tensor, counted: Sequence[bool], num_experts: int) -> list[float]:
    """Tokens that chose each expert, divided by the number of counted tokens; sums to N."""
    chosen = [0] * num_experts
    for token, counts in enumerate(counted):
        for i in index[token].tolist() if counts else ():
            chosen[i] += 1
    return [count / sum(counted) for count in chosen]


def router_z_loss(logits_per_layer: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean of `logsumexp(logits)^2` over the (layer, token) pairs that count.

    Args:
        logits_per_layer: For each layer, [tokens, M].
        mask: [tokens], True on tokens that count.

    Returns:
        Scalar, float64; 0 when no token counts. Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    total = torch.zeros((), dtype=torch.float64)
    pairs = 0
    for logits in logits_per_layer:
        for token in range(len(mask)):
            if bool(mask[token]):
                row = logits[token].double()
                top = row.detach().max()
                total = total + (top + torch.log(torch.exp(row - top).sum())) ** 2
                pairs += 1
    return total / pairs if pairs else total


@dataclass(frozen=True)
class Adapter:
    """One PERFT adapter of one block: `A` [M, r, hidden], `B` [M, hidden, r] and, for R, its `router` [M, hidden]."""

    variant: str
    A: Tensor
    B: Tensor
    scale: float = 1.0
    kind: str = "lora"
    router: Tensor | None = None
    top_k: int | None = None
    normalize: bool = False


@dataclass(frozen=True)
class BaseBlock:
    """The parameters of a stock Mixtral- or OLMoE-style block.

    `gate` [E, hidden], `gate_up_proj` [E, 2 * width, hidden] (gate rows first), `down_proj` [E, hidden, width].
    `cast_weights`: OLMoE casts its routing weights back to the dtype of the logits, Mixtral leaves them float32.
    """

    gate: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    act: Callable[[Tensor], Tensor]
    top_k: int
    normalize: bool
    cast_weights: bool

    @classmethod
    def read(cls, block: nn.Module) -> BaseBlock:
        """Read the parameters of a stock block, also when a tuner has wrapped its experts as `base_layer`."""
        experts = getattr(block.experts, "base_layer", block.experts)
        router = block.gate
        mixtral = type(router).__name__ == "MixtralTopKRouter"
        if not mixtral and type(router).__name__ != "OlmoeTopKRouter":
            raise ValueError(f"only Mixtral and OLMoE blocks have a twin here, got a {type(router).__name__}")
        return cls(
            gate=router.weight,
            gate_up_proj=experts.gate_up_proj,
            down_proj=experts.down_proj,
            act=experts.act_fn,
            top_k=router.top_k,
            normalize=True if mixtral else router.norm_topk_prob,
            cast_weights=not mixtral,
        )

    def route(self, h: Tensor) -> tuple[list[int], Tensor]:
        """Chosen experts of one token and their weights, [top_k].

        The stock routers take their softmax in float32 in a float64 model too. A float64 softmax here would differ
        from them by 1e-8 and hide errors of that size, so the twin rounds where they round.
        """
        logits = self.gate.double() @ h
        probs = torch.softmax(logits.float(), dim=-1)
        chosen = largest(probs, self.top_k)
        weights = torch.stack([probs[i] for i in chosen])
        if self.normalize:
            weights = weights / weights.sum()
        return chosen, weights.double() if self.cast_weights else weights

    def expert(self, i: int, h: Tensor) -> Tensor:
        """`Wd_i (act(Wgate_i h) * Wup_i h)`, [hidden]."""
        width = self.down_proj.shape[2]
        gate = self.gate_up_proj[i, :width].double() @ h
        up = self.gate_up_proj[i, width:].double() @ h
        return self.down_proj[i].double() @ (self.act(gate) * up)


def moe_block(hidden: Tensor, base: BaseBlock, adapter: Adapter | None = None) -> Tensor:
    """Output of a stock block with a PERFT adapter beside its experts (arXiv 2411.08212, section 3).

    Args:
        hidden: Block input, [tokens, hidden].
        base: The block, from `BaseBlock.read`.
        adapter: None leaves the block as it is.

    Returns:
        `y[t] = sum_{i in top-K} g_i E_i(h_t) + delta(h_t)`, [tokens, hidden], float64, without the residual. Delta is
        R: `sum_{j in top-N of its own router} w_j D_j`; E: `sum_{i in top-K} g_i D_i`; D: `sum_j D_j`; S: `D_0`.
    """
    rows, chosen_rows, weight_rows = [], [], []
    for h in hidden.double():
        chosen, weights = base.route(h)
        rows.append(sum(w * base.expert(i, h) for i, w in zip(chosen, weights, strict=True)))
        chosen_rows.append(chosen)
        weight_rows.append(weights)
    output = torch.stack(rows)
    if adapter is None:
        return output
    if adapter.variant == "R":
        _, index, weights = route(hidden, adapter.router, adapter.top_k, adapter.normalize)
    elif adapter.variant == "E":
        index, weights = torch.tensor(chosen_rows), torch.stack(weight_rows)
    elif adapter.variant == "D" or (adapter.variant == "S" and adapter.A.shape[0] == 1):
        index, weights = None, None
    else:
        raise ValueError(f"no variant {adapter.variant!r} with {adapter.A.shape[0]} adapters")
    return output + routed_adapter(hidden, index, weights, adapter.A, adapter.B, scale=adapter.scale, kind=adapter.kind)
