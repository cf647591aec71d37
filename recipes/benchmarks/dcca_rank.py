"""One rank of a timing: several models side by side in one process group, in turns. Started by `rank_processes.py`.

    python dcca_rank.py job.json result.json

The job: `arms` (name -> `model`, a folder, and `implementation`, an `ep_implementation`, and `top_k`), `kind` "train" or
"decode", `batch_size` and `length` of each rank's own rows, `rounds`, `steps` of one visit, `new_tokens`.
"""

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from network_namespaces import count_sent_bytes
from step_cost import Step, profile_operations, time_steps, training_step
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from hf_moe_ext import TrafficMeter  # and every loader knows our model types after this

EXCHANGES = ("_c10d_functional::all_to_all_single", "c10d::alltoall_base_")


def main() -> None:
    """Measure; the first rank writes."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job.get("threads", 1))
    # Steps on one batch again and again drive gradients into denormal numbers, on which a CPU divides ten times slower.
    torch.set_flush_denormal(True)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks > 1:
        distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    models = {name: load(arm, num_ranks) for name, arm in job["arms"].items()}
    batches = {name: draw_batch(model, job, rank) for name, model in models.items()}
    measure = {"train": measure_training, "decode": measure_decoding}[job["kind"]]
    result = measure(models, batches, job)
    if rank == 0:
        partial = Path(f"{sys.argv[2]}.partial")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(sys.argv[2])
    if num_ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def load(arm: dict[str, Any], num_ranks: int) -> Any:
    """The model of one arm, its experts spread over all ranks."""
    options: dict[str, Any] = {} if arm.get("top_k") is None else {"num_experts_per_tok": arm["top_k"]}
    if num_ranks > 1:
        layout = DistributedConfig(fsdp_size=num_ranks, ep_size=num_ranks, ep_implementation=arm["implementation"])
        options["distributed_config"] = layout
    return AutoModelForCausalLM.from_pretrained(arm["model"], dtype=torch.float32, **options)


def draw_batch(model: Any, job: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """Rows of the rank's own, the same for every arm."""
    generator = torch.Generator().manual_seed(1000 + rank)
    ids = torch.randint(3, model.config.vocab_size, (job["batch_size"], job["length"]), generator=generator)
    return {"input_ids": ids, "labels": ids}


def measure_training(models: dict[str, Any], batches: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Per arm and round: seconds of a step (the slowest rank's median over the visit), and of its exchanges.

    A visit makes a fresh optimizer, takes one step that does not count, the timed steps, and one more whose exchanges
    are timed one by one: that step waits at each of them and is in no step's time.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"step": [], "exchange": []} for name in models}
    facts: dict[str, Any] = {}
    for number in range(job["rounds"]):
        order = list(models)
        random.Random(number).shuffle(order)
        for name in order:
            with training_step(models[name], batches[name]) as (step, _):
                barrier()
                seconds = [wall for wall, _ in time_steps(step, "cpu", 1, job["steps"])]
                found[name]["step"].append(slowest(statistics.median(seconds)))
                timer = ExchangeTimer()
                with timer:
                    step()
                found[name]["exchange"].append(slowest(timer.seconds))
                if name not in facts:
                    wire = count_wire_bytes(step)
                    facts[name] = {"exchanges": timer.num_calls, "wire_bytes": wire, **count_traffic(step)}
    profiles = {}
    for name in models if job.get("profile") else ():
        with training_step(models[name], batches[name]) as (step, _):
            step()
            profiles[name] = {key: ms for key, ms in profile_operations(step, "cpu").items() if ms >= 0.1}
    return {"seconds": found, "facts": facts, "profiles": profiles}


@torch.no_grad()
def measure_decoding(models: dict[str, Any], batches: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Per arm and round: seconds of the prompt, and the median seconds of a token after it, of the slowest rank.

    The arms write in turns, token by token. All of them are fed the same tokens, so that routing differs by the models
    alone. Weights that FSDP has gathered stay gathered, as in serving.
    """
    for model in models.values():
        model.eval()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in models}
    names = list(models)
    for number in range(-1, job["rounds"]):  # the first one only warms up
        caches = {name: DynamicCache(config=models[name].config) for name in names}
        steps: dict[str, list[float]] = {name: [] for name in names}
        tokens = batches[names[0]]["input_ids"]
        for position in range(job["new_tokens"]):
            shift = (number + position) % len(names)
            for name in names[shift:] + names[:shift]:
                barrier()
                began = time.perf_counter()
                models[name](input_ids=tokens, past_key_values=caches[name], logits_to_keep=1)
                steps[name].append(time.perf_counter() - began)
            tokens = batches[names[0]]["input_ids"][:, position % job["length"], None]
        if number >= 0:
            for name in names:
                found[name]["prefill"].append(slowest(steps[name][0]))
                found[name]["token"].append(slowest(statistics.median(steps[name][1:])))
    return {"seconds": found}


class ExchangeTimer(TorchDispatchMode):
    """Seconds of every all-to-all, forward and backward: from a barrier to the received rows.

    Without the barrier it would also time how long a rank waits for slower ones, which is their computing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.num_calls = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Time the exchanges, pass everything else on."""
        if func._schema.name not in EXCHANGES:
            return func(*args, **(kwargs or {}))
        barrier()
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            result = torch.ops._c10d_functional.wait_tensor(result)
        else:
            result[-1].wait() if isinstance(result, tuple) else result.wait()
        self.seconds += time.perf_counter() - began
        self.num_calls += 1
        return result


def count_traffic(step: Step) -> dict[str, Any]:
    """Bytes that the step's exchanges handed to other ranks, payload and metadata apart."""
    with TrafficMeter() as meter:
        step()
    return {f"{kind}_bytes": meter.bytes(kind) for kind in ("payload", "metadata")}


def count_wire_bytes(step: Step) -> int | None:
    """Bytes this rank's interface sends in a step, all collectives and headers included; None without one of its own."""
    barrier()
    before = count_sent_bytes()
    step()
    barrier()
    after = count_sent_bytes()
    return None if before is None or after is None else after - before


def slowest(seconds: float) -> float:
    """The greatest of all ranks' values."""
    if not distributed.is_initialized():
        return seconds
    value = torch.tensor(seconds, dtype=torch.float64)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return float(value)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if distributed.is_initialized():
        distributed.barrier()


if __name__ == "__main__":
    main()
