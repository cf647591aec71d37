"""Which experts deserve an adapter: those that the base router really sends this task's tokens to.

In the manner of ESFT (arXiv 2407.01906), which trains the experts a task uses and no others; here they get PERFT-E
adapters, so that a model of 128 or 256 experts does not have to carry one for each.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_moe_ext.host.blocks import ExpertsSite, iterate_experts


@torch.no_grad()
def choose_experts_to_adapt(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    expert_fraction: float = 0.25,
    by: Literal["tokens", "weights"] = "tokens",
) -> dict[str, list[int]]:
    """Run some batches and name the most used experts of every layer: ``PerftConfig(variant="E", expert_ids=...)``.

    Args:
        model: the base model, with or without adapters; left as it was, in evaluation mode while it runs.
        batches: what the model is called with (``input_ids``, ``attention_mask`` ...); padding is not counted. Some ten
            thousand tokens of the task are plenty.
        expert_fraction: share of each layer's experts to choose, rounded up.
        by: what makes an expert used: the tokens sent to it, or their router weights summed.

    Returns:
        Experts module -> ids of its chosen experts, in ascending order.

    Raises:
        ValueError: a fraction outside (0, 1], no MoE block, or no token in the batches.
    """
    if not 0 < expert_fraction <= 1:
        raise ValueError(f"choose_experts_to_adapt: expert_fraction must be in (0, 1]; got {expert_fraction!r}")
    if by not in ("tokens", "weights"):
        raise ValueError(f"choose_experts_to_adapt: by must be 'tokens' or 'weights'; got {by!r}")
    # Names as PerftConfig wants them: without the prefix of a PeftModel.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sites = list(iterate_experts(base))
    if not sites:
        raise ValueError(f"choose_experts_to_adapt: no MoE block found in {type(model).__name__}")
    use = count_expert_use(model, sites, batches, by)
    if not any(counts.any() for counts in use.values()):
        raise ValueError("choose_experts_to_adapt: the batches hold no token; give some of the task's rows")
    chosen = {}
    for name, counts in use.items():
        keep = max(1, -int(-expert_fraction * len(counts) // 1))
        # Stable: experts nobody used fill up in order.
        chosen[name] = sorted(counts.sort(descending=True, stable=True).indices[:keep].tolist())
    return chosen


def count_expert_use(
    model: nn.Module, sites: list[ExpertsSite], batches: Iterable[Mapping[str, Tensor]], by: str
) -> dict[str, Tensor]:
    """Experts module -> [num_experts] tokens sent to each expert, or their summed router weights; float64."""
    use = {site.name: torch.zeros(site.num_experts, dtype=torch.float64) for site in sites}
    mask: list[Tensor | None] = [None]

    def count(site: ExpertsSite) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", site.index_name, site.weights_name), args, strict=False)) | kwargs
            index, weights = given[site.index_name].cpu(), given[site.weights_name].double().cpu()
            amount = torch.ones_like(weights) if by == "tokens" else weights
            counted = mask[0]
            if counted is not None and len(counted) == len(index):
                amount = amount * counted[:, None]
            inside = (index >= 0) & (index < site.num_experts)
            use[site.name].index_add_(0, index[inside], amount[inside])

        return hook

    handles = [site.experts.register_forward_pre_hook(count(site), with_kwargs=True) for site in sites]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        device = next(model.parameters()).device
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            attention = batch.get("attention_mask")
            mask[0] = attention.reshape(-1).cpu().double() if attention is not None and attention.ndim == 2 else None
            model(**inputs)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return use
