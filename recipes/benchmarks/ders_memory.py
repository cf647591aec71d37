"""Bytes of whole models, training and answering: vanilla upcycling, shared base with deltas, and the dense parent."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from ders_presets import MemoryPreset
from step_cost import count_bytes, measure_transient_bytes, state_tensors, time_steps, training_step
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe_ext.convert import upcycle

VANILLA, FUSED = "vanilla", "low rank, fused"
# The paper's savings of low-rank deltas against vanilla upcycling (Table 6: Coder-MoE, 4 experts, top-1, r = 4).
TRAINING_BAR, INFERENCE_BAR = 0.21, 0.44


def list_arms(preset: MemoryPreset) -> dict[str, dict[str, Any] | None]:
    """Arm -> arguments of the upcycling; None: the parent itself."""
    low_rank = {"delta": "low_rank", "rank": preset.rank}
    return {
        "dense": None,
        VANILLA: {"form": "vanilla"},
        FUSED: low_rank,
        "low rank, materialised": low_rank,
        "sparse, fused": {"delta": "sparse", "drop_rate": preset.drop_rate},
        "quantised, fused": {"delta": "quantized"},
    }


def measure_memory(preset: MemoryPreset) -> dict[str, Any]:
    """Build, convert and measure every arm, one after the other.

    Returns:
        The part of the JSON: bytes of weights, training and inference, by arm, and the savings against vanilla.
    """
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder) / "parent"
        build_parent(preset).save_pretrained(parent)
        arms = {}
        for name, arguments in list_arms(preset).items():
            source = parent
            if arguments is not None:
                source = Path(folder) / name.replace(" ", "-").replace(",", "")
                upcycle(parent, source, num_experts=preset.num_experts, top_k=preset.top_k, verify=False, **arguments)
            path = {"ders_forward": "materialised"} if "materialised" in name else {}
            arms[name] = measure_arm(source, preset, path)
            gc.collect()
    return {
        "arms": arms,
        "saved": {
            name: {kind: 1 - arm[kind] / arms[VANILLA][kind] for kind in ("training_bytes", "inference_bytes")}
            for name, arm in arms.items()
            if name != VANILLA
        },
    }


def build_parent(preset: MemoryPreset) -> LlamaForCausalLM:
    """A random Llama, head and embedding apart as DeepSeek-Coder has them."""
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**{name: getattr(preset, name) for name in names}, max_position_embeddings=preset.length)
    return LlamaForCausalLM(config).to(getattr(torch, preset.dtype))


def measure_arm(source: Path, preset: MemoryPreset, keys: dict[str, Any]) -> dict[str, Any]:
    """One model: what it holds, and the most it holds at a time beyond that.

    `training_bytes`: weights, AdamW's moments and the peak of one step (gradients, activations, temporaries);
    `inference_bytes`: weights and the peak of one forward without a graph.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(source, use_cache=False, **keys)
    model.to(preset.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(preset.vocab_size, (preset.batch_size, preset.length), generator=generator).to(preset.device)
    batch = {"input_ids": ids, "labels": ids}
    weights = count_bytes([*model.parameters(), *model.buffers()])
    with training_step(model.train(), batch) as (step, optimizer):
        time_steps(step, preset.device, 1, 1)
        step_peak = measure_transient_bytes(step, preset.device)
        state = count_bytes(state_tensors(optimizer))
    model.eval()

    @torch.no_grad()
    def answer() -> None:
        model(input_ids=ids, logits_to_keep=1)

    answer()
    answer_peak = measure_transient_bytes(answer, preset.device)
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": weights,
        "disk_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "optimizer_bytes": state,
        "step_peak_bytes": step_peak,
        "training_bytes": weights + state + step_peak,
        "answer_peak_bytes": answer_peak,
        "inference_bytes": weights + answer_peak,
    }
