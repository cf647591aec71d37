"""What PERFT R, E, D, S and LoRA cost at generation against the bare base; the numbers of a model card.

    python recipes/benchmarks/perft_inference.py [--threads 2] [--rounds 12 5] [--card_dir model_cards]

All methods share one frozen OLMoE-shaped model with random weights, are measured in turn in one process, and start as
no-ops: so every method walks the same tokens through the same experts, and only the adapters' work differs. They write
greedily in lockstep, each token by every method in turn, in an order that rotates.
"""

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from perft_inference_card import render_card
from step_cost import quartiles
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, OlmoeConfig, PreTrainedModel

from hf_moe_ext import PerftConfig

BASE = "base"
# Ranks give every PERFT method R's active parameters (E: its rank times 8 active experts is four times as much).
METHODS: dict[str, dict[str, Any]] = {
    "R": {"variant": "R", "r": 16, "num_experts": 4, "top_k": 2},
    "E": {"variant": "E", "r": 16},
    "D": {"variant": "D", "r": 8, "num_experts": 4},
    "S": {"variant": "S", "r": 32},
    "LoRA q, v": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
}


def main() -> None:
    """Measure, write the JSON and the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, nargs="+", default=[12, 5], help="Per batch size.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--intermediate_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_experts", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=12576, help="OLMoE's by its share of the layers.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    models = build_models(options)
    results = {
        "command": shlex.join(["python", "recipes/benchmarks/perft_inference.py", *sys.argv[1:]]),
        "device": f"{platform.system()} {platform.machine()} CPU, {options.threads} threads of {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {
            key: getattr(options, key)
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_experts", "vocab_size", "dtype")
        }
        | {"top_k": 8, "parameters": sum(p.numel() for p in models[BASE].parameters())},
        "prompt_length": options.prompt_length,
        "new_tokens": options.new_tokens,
        "load_before": os.getloadavg()[0],
        "adapters": {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for name, model in models.items()
            if name != BASE
        },
        "batches": {
            str(batch): summarize(measure(models, batch, rounds, options))
            for batch, rounds in zip(options.batch_sizes, options.rounds, strict=True)
        },
    }
    results["load_after"] = os.getloadavg()[0]
    options.card_dir.mkdir(parents=True, exist_ok=True)
    (options.card_dir / "perft-inference.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.card_dir / "perft-inference.md").write_text(render_card(results), encoding="utf-8")
    print(render_card(results))


def build_models(options: argparse.Namespace) -> dict[str, Any]:
    """The bare base, and one model per method that shares the base's tensors but no module of it."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.hidden_size // 64,
        num_experts=options.num_experts,
        num_experts_per_tok=8,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval().requires_grad_(False)
    models: dict[str, Any] = {BASE: base}
    for name, arguments in METHODS.items():
        kind = PerftConfig if "variant" in arguments else LoraConfig
        adapter: PeftConfig = kind(task_type="CAUSAL_LM", **arguments)
        models[name] = get_peft_model(share_weights(base), adapter).eval()
    return models


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same tensors."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def measure(
    models: dict[str, Any], batch: int, rounds: int, options: argparse.Namespace
) -> dict[str, list[list[float]]]:
    """Seconds to each greedy token since the one before, per method and round; the first is that of the whole prompt.

    Raises:
        RuntimeError: a method wrote another token than the base, so that it did other work.
    """
    prompt = torch.randint(3, options.vocab_size, (batch, options.prompt_length))
    names = list(models)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first only warms up
        caches = {name: DynamicCache(config=models[BASE].config) for name in names}
        steps: dict[str, list[float]] = {name: [] for name in names}
        tokens = prompt
        for step in range(options.new_tokens):
            shift = (number + step) % len(names)
            written = {}
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                outputs = models[name](input_ids=tokens, past_key_values=caches[name], logits_to_keep=1)
                written[name] = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
                steps[name].append(time.perf_counter() - start)
            tokens = written[BASE]
            for name, token in written.items():
                if not torch.equal(token, tokens):
                    raise RuntimeError(f"{name} at batch {batch} wrote another token than the base")
        if number >= 0:
            for name in names:
                seconds[name].append(steps[name])
        print(f"batch {batch}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def summarize(seconds: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Per method: times in milliseconds, tokens per second of one row while decoding, its ratios to the base's."""
    summary = {}
    for name, rounds in seconds.items():
        steps = sorted(step for times in rounds for step in times[1:])
        pairs = list(zip(rounds, seconds[BASE], strict=True))
        # A step against the base's same step, a moment apart; the median of a round hardly feels what else ran then.
        speed = [statistics.median(b / a for a, b in zip(own[1:], base[1:], strict=True)) for own, base in pairs]
        summary[name] = {
            "rounds": len(rounds),
            "first_token_ms": 1e3 * statistics.median(times[0] for times in rounds),
            "token_p50_ms": 1e3 * statistics.median(steps),
            "token_p95_ms": 1e3 * steps[min(len(steps) - 1, int(0.95 * len(steps)))],
            "tokens_per_second": 1 / statistics.median(steps),
            "speed_ratio": quartiles(speed),
            "first_token_ratio": quartiles([own[0] / base[0] for own, base in pairs]),
        }
    return summary


if __name__ == "__main__":
    main()
