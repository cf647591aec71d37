"""The memory model against real training steps: allocated bytes at the peak, predicted and measured.

Each shape is trained by `Trainer` for three steps. Measured: the parameters' bytes, and on top the highest sum of the
allocator's records during training (`step_cost.py`), optimizer states, gradients, activations and temporaries alike; on a
GPU `max_memory_allocated`. Predicted: `hf_moe_ext.scaling.memory.training_memory` from the configuration alone.

    python recipes/benchmarks/memory_model.py --output memory.json
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_cost import count_bytes, measure_transient_bytes
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig, Trainer, TrainingArguments

from hf_moe_ext import OlmoeExtConfig
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.memory import TrainingStep, training_memory
from hf_moe_ext.scaling.operations import Tokens
from hf_moe_ext.scaling.shape import MoeShape

STEPS = 3
MIB = 2**20
SMALL_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def make_cases(scale: int = 1) -> dict[str, tuple[PreTrainedConfig, dict[str, Any]]]:
    """Name -> configuration and how it is trained; peaks of 1 GiB and more at scale 1, divided widths above."""
    common: dict[str, Any] = {"num_attention_heads": 8, "max_position_embeddings": 2048, **SMALL_IDS}
    wide: dict[str, Any] = {"hidden_size": 512 // scale, "vocab_size": 16384 // scale, **common}
    olmoe = OlmoeConfig(
        num_hidden_layers=4, intermediate_size=512 // scale, num_experts=16, num_experts_per_tok=4, num_key_value_heads=8,
        **wide,
    )  # fmt: skip
    mixtral = MixtralConfig(
        num_hidden_layers=6, intermediate_size=1024 // scale, num_local_experts=8, num_experts_per_tok=2,
        num_key_value_heads=4, **wide,
    )  # fmt: skip
    dcca = OlmoeExtConfig(
        num_hidden_layers=6, intermediate_size=512 // scale, num_experts=16, num_experts_per_tok=4, num_key_value_heads=8,
        moe_block="dcca", moe_latent_size=128 // scale, **wide,
    )  # fmt: skip
    ders = OlmoeExtConfig(
        num_hidden_layers=6, intermediate_size=1024 // scale, num_experts=16, num_experts_per_tok=4, num_key_value_heads=8,
        moe_block="ders", ders_delta="low_rank", ders_rank=32 // scale, **wide,
    )  # fmt: skip
    return {
        "olmoe float32": (olmoe, {"num_sequences": 4, "sequence_length": 512 // scale}),
        "mixtral autocast": (mixtral, {"num_sequences": 4, "sequence_length": 512 // scale, "precision": "autocast"}),
        "dcca float32": (dcca, {"num_sequences": 4, "sequence_length": 512 // scale}),
        "ders float32": (ders, {"num_sequences": 4, "sequence_length": 512 // scale}),
        "olmoe full recompute": (olmoe, {"num_sequences": 8, "sequence_length": 512 // scale, "recompute": "full"}),
        "mixtral two micro-batches": (
            mixtral, {"num_sequences": 2, "sequence_length": 512 // scale, "num_micro_batches": 2},
        ),
    }  # fmt: skip


def predict(config: PreTrainedConfig, num_sequences: int, sequence_length: int, **step: Any) -> Any:
    """The model's peak for one rank."""
    settings = {"precision": "float32", **step}
    return training_memory(
        MoeShape.from_hf(config), Layout(), TrainingStep(Tokens(num_sequences, sequence_length), **settings)
    )


def measure(
    config: PreTrainedConfig,
    num_sequences: int,
    sequence_length: int,
    precision: str = "float32",
    recompute: str = "none",
    num_micro_batches: int = 1,
    device: str = "cpu",
) -> int:
    """Bytes allocated at the peak of a training run of `Trainer`."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    if recompute == "full":
        model.gradient_checkpointing_enable()
    ids = torch.randint(2, config.vocab_size, (STEPS * num_sequences * num_micro_batches, sequence_length))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=num_sequences, save_strategy="no",
            gradient_accumulation_steps=num_micro_batches, report_to=[],
            bf16=precision == "autocast", use_cpu=device == "cpu", disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        # What an earlier run left in cycles would be given back during this one, and be counted as less.
        gc.collect()
        return count_bytes([*model.parameters(), *model.buffers()]) + measure_transient_bytes(trainer.train, device)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="Divide widths and lengths by this, for a quick look.")
    options = parser.parse_args(argv)
    results = []
    for name, (config, settings) in make_cases(options.scale).items():
        predicted = predict(config, **settings)
        measured = measure(config, **settings, device=options.device)
        ratio = predicted.total / measured
        results.append(
            {
                "case": name, **settings, "measured_bytes": measured, "predicted_bytes": predicted.total, "ratio": ratio,
                "moment": predicted.moment, "buckets": predicted.peak.as_dict(),
            }
        )  # fmt: skip
        print(
            f"{name:28} {measured / MIB:9.1f} MiB measured {predicted.total / MIB:9.1f} predicted {ratio:6.3f}",
            flush=True,
        )
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
