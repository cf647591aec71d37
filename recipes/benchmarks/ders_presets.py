"""Sizes of `ders.py`'s parts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPreset:
    """Part `time`: the experts of one layer, against one dense FFN of the same sizes."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_experts: int = 8
    top_k: tuple[int, ...] = (1, 2, 4)
    rank: int = 4
    drop_rate: float = 0.9
    bits: int = 4
    num_tokens: int = 512
    num_threads: tuple[int, ...] = (1, 2)
    forward_top_k: int = 2
    rounds: int = 9
    slow_rounds: int = 2
    steps: int = 1
    decode_steps: int = 20
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class MemoryPreset:
    """Part `memory`: whole models; the shape of DeepSeek-Coder-1.3B (paper's Table 6), every size about a quarter."""

    vocab_size: int = 8064
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_experts: int = 4
    top_k: int = 2
    rank: int = 4
    drop_rate: float = 0.9
    bits: int = 4
    batch_size: int = 2
    length: int = 256
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class QualityPreset:
    """Parts `quality` and `compression`: runs of `upcycle.py`, each one arm."""

    arms: tuple[str, ...] = ("low_rank", "sparse", "vanilla", "dense")
    learning_rates: tuple[str, ...] = ("5e-4", "1e-3", "2e-3", "4e-3")
    delta_ratios: tuple[str, ...] = ("1", "8", "32")  # of the deltas' rate, at the best rate with ratio 1
    search_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    flags: tuple[str, ...] = ("--max_steps", "300", "--per_device_train_batch_size", "4", "--max_eval_samples", "192")
    drop_rates: tuple[float, ...] = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
    mask_seeds: tuple[int, ...] = (0, 1)
    bits: tuple[int, ...] = (8, 4, 2, 1)
    group_size: int = 64
    num_rows: int = 24


@dataclass(frozen=True)
class Preset:
    """One size of every part."""

    layer: LayerPreset = LayerPreset()
    memory: MemoryPreset = MemoryPreset()
    quality: QualityPreset = QualityPreset()


CPU4 = Preset()
# The paper's own shape (universal FFN left out), one GPU.
GPU80 = Preset(
    layer=LayerPreset(num_tokens=8192, num_threads=(1,), device="cuda", dtype="bfloat16", rounds=30, slow_rounds=10, steps=5),
    memory=MemoryPreset(
        vocab_size=32256, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        batch_size=4, length=1024, device="cuda", dtype="bfloat16",
    ),
)  # fmt: skip
SMOKE = Preset(
    layer=LayerPreset(
        hidden_size=32, intermediate_size=64, num_experts=4, top_k=(1, 2), num_tokens=16, num_threads=(1,), rounds=2, slow_rounds=1,
        decode_steps=2,
    ),
    memory=MemoryPreset(
        vocab_size=64, hidden_size=128, intermediate_size=344, num_hidden_layers=1, num_attention_heads=2, batch_size=1, length=16
    ),
    quality=QualityPreset(
        arms=("low_rank", "vanilla"), learning_rates=("1e-3",), delta_ratios=("1", "4"), seeds=(0, 1), drop_rates=(0.5, 0.9), mask_seeds=(0,),
        bits=(4, 1), group_size=16, num_rows=2,
        flags=(
            "--max_steps", "3", "--warmup_steps", "1", "--max_eval_samples", "4", "--max_length", "32",
            "--parent_hidden_size", "32", "--parent_intermediate_size", "48", "--parent_num_layers", "1",
            "--parent_vocab_size", "300", "--parent_max_steps", "4",
        ),
    ),
)  # fmt: skip
PRESETS = {"cpu4": CPU4, "gpu80": GPU80, "smoke": SMOKE}
