"""Routing counted by hand: from what each router read and its weights, in Python's own numbers, one token at a time.

It knows the families' rules for choosing (see ``zoo``) and shares nothing with the audit but torch's hooks on routers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SIGMOID = ("deepseek_v3", "glm4_moe", "minimax_m2", "nemotron_h", "exaone_moe")
GROUPED = ("deepseek_v3", "glm4_moe", "nemotron_h", "exaone_moe")


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Path of the experts, the block and its router, in the model's order."""
    for name, block in model.named_modules():
        children = dict(block.named_children())
        router = children.get("gate", children.get("router"))
        if "experts" in children and router is not None:
            yield f"{name}.experts", block, router


def weight_of(router: nn.Module) -> Tensor:
    """[num_experts, hidden]."""
    weight = router.wg.weight if hasattr(router, "wg") else router.weight
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def correction_of(block: nn.Module, router: nn.Module) -> Tensor | None:
    """[num_experts] what a family adds to the scores it chooses by, and to nothing else."""
    for owner in (router, block, getattr(router, "moe_statics", None)):
        found = getattr(owner, "e_score_correction_bias", None)
        if isinstance(found, Tensor):
            return found
    return None


def spread_corrections(model: nn.Module, seed: int = 0) -> None:
    """Give the corrections values, which are zero at birth, so that who forgets them is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, block, router in blocks(model):
            found = correction_of(block, router)
            if found is not None:
                found.copy_(torch.randn(found.shape, generator=generator) * 0.2)


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Path of the experts -> the rows [tokens, hidden] its router read in each call outside of a backward."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, _, router in blocks(model):
        rows = seen.setdefault(name, [])

        def keep(module: nn.Module, args: Any, rows: list[Tensor] = rows) -> None:
            if torch._C._current_graph_task_id() == -1:
                rows.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

        handles.append(router.register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def naive_logits(block: nn.Module, router: nn.Module, rows: Tensor) -> list[list[float]]:
    """[tokens][num_experts] from the weight."""
    logits = rows.double() @ weight_of(router).detach().double().T
    bias = getattr(router, "bias", None)
    return (logits if bias is None else logits + bias.detach().double()).tolist()


def scores(family: str, logits: list[float]) -> list[float]:
    """What a family makes of one token's logits, before it chooses."""
    if family in SIGMOID:
        return [1 / (1 + math.exp(-x)) for x in logits]
    shifted = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(shifted) for x in shifted]


def choose(family: str, logits: list[float], correction: list[float], top_k: int, config: Any) -> list[int]:
    """The experts of one token."""
    values = [s + c for s, c in zip(scores(family, logits), correction, strict=True)]
    allowed = list(range(len(values)))
    if family in GROUPED:
        size = len(values) // config.n_group
        groups = [allowed[i : i + size] for i in range(0, len(values), size)]
        best = sorted(groups, key=lambda group: -sum(sorted((values[i] for i in group), reverse=True)[:2]))
        allowed = [i for group in best[: config.topk_group] for i in group]
    return sorted(allowed, key=lambda i: -values[i])[:top_k]


def naive_distribution(family: str, logits: list[float]) -> tuple[float, float, float]:
    """Entropy over its largest value, largest probability and margin of one token."""
    values = scores(family, logits)
    p = [v / sum(values) for v in values]
    entropy = -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))
    ordered = sorted(p, reverse=True)
    return entropy, ordered[0], ordered[0] - ordered[1]


def count(
    family: str, model: nn.Module, seen: dict[str, list[Tensor]], masks: list[Tensor | None]
) -> dict[str, dict[str, Any]]:
    """Path of the experts -> counts, coactivation, tokens, and means over tokens.

    Args:
        family: a key of ``zoo.FAMILIES``.
        model: the model, or another of the same weights.
        seen: of ``recorded_inputs``.
        masks: [batch, length] of each call; None: no padding.
    """
    found = {}
    for name, block, router in blocks(model):
        num_experts = len(weight_of(router))
        bias = correction_of(block, router)
        correction = [0.0] * num_experts if bias is None else bias.detach().double().reshape(-1).tolist()
        top_k = next(getattr(o, "top_k") for o in (router, block) if isinstance(getattr(o, "top_k", None), int))  # noqa: B009
        together = [[0] * num_experts for _ in range(num_experts)]
        values, per_call = [], []
        for rows, mask in zip(seen[name], masks, strict=True):
            keep = [True] * len(rows) if mask is None else mask.reshape(-1).bool().tolist()
            calls = [0] * num_experts
            for logits, counted in zip(naive_logits(block, router, rows), keep, strict=True):
                if not counted:
                    continue
                chosen = choose(family, logits, correction, top_k, model.config)
                values.append(naive_distribution(family, logits))
                for i in chosen:
                    calls[i] += 1
                    for j in chosen:
                        together[i][j] += 1
            per_call.append(calls)
        means = [sum(column) / len(column) for column in zip(*values, strict=True)] or [math.nan] * 3
        found[name] = {
            "counts": [together[i][i] for i in range(num_experts)],
            "coactivation": together,
            "tokens": len(values),
            "per_call": per_call,
            "entropy": means[0],
            "max_probability": means[1],
            "margin": means[2],
        }
    return found
