"""Sizes of `dcca.py`'s parts."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class LossPreset:
    """Part `loss`: a small model, so that dozens of runs are possible; the stock expert is a quarter of the width."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_experts: int = 32
    top_k: int = 8
    length: int = 128
    batch_size: int = 8
    max_steps: int = 600
    warmup_steps: int = 40
    num_decay_steps: int = 120
    eval_steps: int = 60
    num_curve_rows: int = 96
    num_held_out_rows: int = 400
    learning_rates: tuple[str, ...] = ("5e-4", "1e-3", "2e-3", "4e-3")
    search_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_variant_seeds: int = 3
    num_time_rounds: int = 10
    all_variants: bool = True
    source_dir: str | None = None


@dataclass(frozen=True)
class StepPreset:
    """Parts `step`, `link`, `decode`, `bytes`: one wide layer with random weights.

    Attention and vocabulary are small: they are the same in both arms, and FSDP sends their weights over the same link.
    Rows are each rank's own.
    """

    vocab_size: int = 128
    num_attention_heads: int = 2
    head_dim: int = 32
    hidden_size: int = 1024
    intermediate_size: int = 256
    num_hidden_layers: int = 1
    num_experts: int = 64
    top_k: int = 8
    latent_size: int = 256
    batch_size: int = 4
    length: int = 256
    link_batch_size: int = 4
    rounds: int = 5
    steps: int = 1
    link_rounds: int = 3
    link_share: float = 0.85
    num_ranks: tuple[int, ...] = (1, 2, 4)
    link_ranks: int = 4
    decode_ranks: tuple[int, ...] = (2, 4)
    decode_batch_size: int = 4
    prompt_length: int = 128
    new_tokens: int = 16
    device: str = "cpu"


@dataclass(frozen=True)
class ProbePreset:
    """Part `probe`: which of the `loss` part's runs it reads, and how the probe is trained."""

    num_train_tokens: int = 60_000
    num_test_tokens: int = 20_000
    num_epochs: int = 6
    batch_size: int = 512
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Preset:
    """One size of every part."""

    loss: LossPreset = LossPreset()
    step: StepPreset = StepPreset()
    probe: ProbePreset = ProbePreset()


CPU4 = Preset()
# One GPU: the step on one device, at OLMoE's width. No ranks, no link: those parts are for machines with several.
GPU80 = Preset(
    step=StepPreset(
        vocab_size=50304, num_attention_heads=16, head_dim=128, hidden_size=2048, intermediate_size=1024, num_hidden_layers=4, latent_size=512,
        batch_size=4, length=2048, num_ranks=(1,), decode_ranks=(), link_ranks=0, device="cuda",
    )
)  # fmt: skip
SMOKE = Preset(
    loss=LossPreset(
        vocab_size=300, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_experts=4, top_k=2, length=32,
        batch_size=2, max_steps=10, warmup_steps=1, num_decay_steps=2, eval_steps=1, num_curve_rows=4,
        num_held_out_rows=8, learning_rates=("2e-3",), seeds=(0, 1), num_variant_seeds=1, num_time_rounds=1, all_variants=False,
    ),
    step=StepPreset(
        vocab_size=64, hidden_size=64, intermediate_size=16, num_experts=8, top_k=2, latent_size=16, batch_size=1,
        length=16, link_batch_size=1, rounds=2, steps=1, link_rounds=1, link_share=0.05, num_ranks=(1, 2), link_ranks=2,
        decode_ranks=(2,), decode_batch_size=1, prompt_length=4, new_tokens=3,
    ),
    probe=ProbePreset(num_train_tokens=400, num_test_tokens=200, num_epochs=1, batch_size=64),
)  # fmt: skip
PRESETS = {"cpu4": CPU4, "gpu80": GPU80, "smoke": SMOKE}


def describe(preset: object) -> dict[str, object]:
    """A preset as JSON holds it."""
    return dataclasses.asdict(preset)  # type: ignore[call-overload]
