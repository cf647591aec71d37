"""One layer's experts against one dense FFN: forward with backward, forward alone, decoding; all in turns."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from ders_presets import LayerPreset
from step_cost import profile_operations, quartiles, ratio_quartiles, time_steps
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_moe_ext.ders.experts import DersExperts

DENSE, VANILLA = "dense FFN", "vanilla MoE (grouped_mm)"
FUSED = "low rank, fused"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


class DenseFfn(nn.Module):
    """One gated FFN of the experts' sizes; the gates are taken and not used."""

    def __init__(self, preset: LayerPreset) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(preset.hidden_size, 2 * preset.intermediate_size, bias=False)
        self.down_proj = nn.Linear(preset.intermediate_size, preset.hidden_size, bias=False)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        del index, weights
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


def build_layers(preset: LayerPreset) -> dict[str, nn.Module]:
    """Every arm, with random weights; the vanilla experts are full copies run as Transformers runs them."""
    sizes = (preset.hidden_size, preset.intermediate_size, preset.num_experts)
    config = MixtralConfig(
        hidden_size=sizes[0], intermediate_size=sizes[1], num_local_experts=sizes[2], num_experts_per_tok=1
    )
    config._experts_implementation = "grouped_mm"
    layers: dict[str, nn.Module] = {
        DENSE: DenseFfn(preset),
        VANILLA: MixtralExperts(config),
        FUSED: DersExperts(*sizes, delta="low_rank", rank=preset.rank),
        "low rank, materialised": DersExperts(*sizes, delta="low_rank", rank=preset.rank, forward_path="materialised"),
        "sparse, fused": DersExperts(*sizes, delta="sparse", drop_rate=preset.drop_rate),
        "sparse, fused, positions held": DersExperts(
            *sizes, delta="sparse", drop_rate=preset.drop_rate, hold_positions=True
        ),
        "quantised, fused": DersExperts(*sizes, delta="quantized", bits=preset.bits),
    }
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        layer.to(preset.device, getattr(torch, preset.dtype))
    return layers


def measure_time(preset: LayerPreset) -> dict[str, Any]:
    """Ratios to the dense FFN by threads, work and top_k, every arm once per round.

    Returns:
        The part of the JSON.
    """
    torch.manual_seed(0)
    layers = build_layers(preset)
    cells = []
    before = torch.get_num_threads()
    try:
        for num_threads in preset.num_threads:
            torch.set_num_threads(num_threads)
            for top_k in preset.top_k:
                for work, num_tokens in (("step", preset.num_tokens), ("forward", preset.num_tokens), ("decode", 1)):
                    if work == "forward" and top_k != preset.forward_top_k:
                        continue
                    cells.append(
                        {"threads": num_threads, "top_k": top_k, "work": work, "tokens": num_tokens}
                        | measure_cell(layers, preset, work, top_k, num_tokens)
                    )
    finally:
        torch.set_num_threads(before)
    return {"cells": cells, "profile": profile_fused(layers, preset)}


def measure_cell(
    layers: dict[str, nn.Module], preset: LayerPreset, work: str, top_k: int, num_tokens: int
) -> dict[str, Any]:
    """Seconds of each arm in turns, and the ratio to the dense FFN within each round."""
    batch = draw_batch(preset, top_k, num_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    count = preset.decode_steps if work == "decode" else preset.steps
    for number in range(preset.rounds):
        # The slow arms, which nobody compares by percents, in the last rounds only.
        names = [
            name for name in layers if name in (DENSE, VANILLA, FUSED) or number >= preset.rounds - preset.slow_rounds
        ]
        for name in names if number % 2 else reversed(names):
            step = make_step(layers[name], batch, backward=work == "step")
            warmup = 0 if seconds[name] else 1
            walls = [wall for wall, _ in time_steps(step, preset.device, warmup, count)]
            seconds[name].append(statistics.median(walls))
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratio": {
            name: ratio_quartiles(values, seconds[DENSE][-len(values) :])
            for name, values in seconds.items()
            if name != DENSE
        },
        "vanilla_over": {
            name: ratio_quartiles(seconds[VANILLA][-len(values) :], values)
            for name, values in seconds.items()
            if name not in (DENSE, VANILLA)
        },
    }


def draw_batch(preset: LayerPreset, top_k: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, distinct experts of each, gates that sum to 1."""
    generator = torch.Generator().manual_seed(top_k)
    dtype = getattr(torch, preset.dtype)
    hidden = torch.randn(num_tokens, preset.hidden_size, generator=generator)
    scores = torch.rand(num_tokens, preset.num_experts, generator=generator)
    gates, index = scores.topk(top_k, dim=-1)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    return tuple(t.to(preset.device) for t in (hidden.to(dtype), index, gates.to(dtype)))  # type: ignore[return-value]


def make_step(layer: nn.Module, batch: tuple[Tensor, Tensor, Tensor], backward: bool) -> Callable[[], None]:
    """A forward with a backward to the input and all weights, or a forward without a graph."""
    hidden, index, gates = batch

    def train() -> None:
        x, g = hidden.detach().requires_grad_(), gates.detach().requires_grad_()
        layer(x, index, g).sum().backward()
        layer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer() -> None:
        layer(hidden, index, gates)

    return train if backward else infer


def profile_fused(layers: dict[str, nn.Module], preset: LayerPreset) -> dict[str, float]:
    """Where the time of a fused step at top-2 goes: operation -> milliseconds of its own, the longest ten."""
    step = make_step(layers[FUSED], draw_batch(preset, min(2, preset.num_experts), preset.num_tokens), backward=True)
    step()
    found = profile_operations(step, preset.device)
    return dict(sorted(found.items(), key=lambda item: -item[1])[:10])
