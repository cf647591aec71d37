"""Sizes of `dcca.py`'s parts."""

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
    learning_rates: tuple[str, ...] = ("2e-3", "4e-3", "8e-3")
    search_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_variant_seeds: int = 3
    source_dir: str | None = None


@dataclass(frozen=True)
class Preset:
    """One size of every part."""

    loss: LossPreset = LossPreset()


PRESETS = {"cpu4": Preset()}
