"""What the ranks of ``tests/dcca/test_meter.py`` and ``test_traffic.py`` run."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from support import expert_exchange as work
from support.distributed_models import load


def metered(rank: int, world_size: int, case: work.Case) -> dict[str, Any]:
    """Per dispatcher: what the meter counted, and the (type, bytes) of each call that the backend itself recorded."""
    from hf_moe_ext.dcca.meter import TrafficMeter

    results = {}
    for name in work.BOTH:
        experts = work.dispatched("batched_mm", name, 1)
        inputs = [tensors[rank] for tensors in case]
        with TrafficMeter() as meter, profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            work.forward_backward(experts, inputs)
        work.forward_backward(experts, inputs)  # not counted
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "gloo:all_to_all"]
        calls = [(e.dtypes()[0], 8 * math.prod(e.shapes()[0])) for e in events]  # everything here is 8 bytes wide
        results[name] = {"flows": meter.as_dict(), "calls": calls, "total": meter.bytes()}
    return results


def metered_checkpointing(rank: int, world_size: int, case: work.Case) -> dict[str, Any]:
    """Flows under gradient checkpointing, both modes."""
    from torch.utils.checkpoint import checkpoint

    from hf_moe_ext.dcca.meter import TrafficMeter

    results = {}
    for name in work.BOTH:
        for reentrant in (False, True):
            experts = work.dispatched("batched_mm", name, 1)

            def run(*inputs: Tensor, experts: Any = experts, reentrant: bool = reentrant) -> Tensor:
                return checkpoint(experts, *inputs, use_reentrant=reentrant)

            run.named_parameters = experts.named_parameters  # type: ignore[attr-defined]
            with TrafficMeter() as meter:
                work.forward_backward(run, [tensors[rank] for tensors in case])
            results[name, reentrant] = {(f["kind"], f["direction"], f["pass"]): f["num_calls"] for f in meter.as_dict()}
    return results


def metered_widths(rank: int, world_size: int, folders: list[Path]) -> list[dict[str, Any]]:
    """Flows of a training step of each folder's model, per dispatcher."""
    from hf_moe_ext.dcca.meter import TrafficMeter

    results = []
    for folder in folders:
        found = {}
        for name in work.BOTH:
            layout = {"fsdp_size": world_size, "ep_size": world_size, "ep_implementation": name}
            model = load(folder, layout)
            with TrafficMeter() as meter:
                work.train_step(model, rank, world_size)
            found[name] = {kind: meter.bytes(kind) for kind in ("payload", "metadata")}
        results.append(found)
    return results


def trained(rank: int, world_size: int, base: Path, out: Path) -> dict[str, Any]:
    """A Trainer with the callback; also what the meter says of the same steps."""
    from transformers import Trainer

    from hf_moe_ext.dcca.traffic_callback import TrafficCallback
    from support.distributed_training import make_trainer

    callback = TrafficCallback(num_steps=3)
    layout = {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "latent_all_to_all"}
    model = load(base, layout)
    trainer: Trainer = make_trainer(model, out)
    trainer.add_callback(callback)
    trainer.train()
    return {"flows": callback.meter.as_dict(), "steps": callback.counted_steps}
