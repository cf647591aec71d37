"""The routers' load over a whole optimizer step: what the auxiliary loss of scope "global" balances against.

A step's load is complete only when all its micro-batches have run, on every process; so the next step uses it. That the
optimizer has stepped is heard from torch itself, so any trainer, loss scaling and sharded optimizer will do.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_moe_ext.ops.reduction import sum_over_processes
from hf_moe_ext.ops.routing import RouterSums
from hf_moe_ext.perft.tape import RouterRecord


def add_load(record: RouterRecord, adapter: str, sums: RouterSums) -> None:
    """Count one micro-batch of one router towards its step."""
    total = sums.detach().total()
    load = torch.cat([total.counts[0], total.tokens])
    record.load[adapter] = record.load[adapter] + load if adapter in record.load else load


def close_step(records: Mapping[str, RouterRecord]) -> None:
    """Make the load counted since the last step, summed over all processes, the one the next step uses."""
    held = [(record, adapter) for record in records.values() for adapter in record.load]
    if not held:
        return  # the second part of a sharded optimizer's step
    loads = [record.load[adapter] for record, adapter in held]
    counts = torch.cat([load.to(loads[0].device) for load in loads])  # one collective for all layers
    counts = sum_over_processes(counts)
    for (record, adapter), load, total in zip(held, loads, counts.split([len(load) for load in loads]), strict=True):
        record.last_load[adapter] = (total[:-1] / total[-1].clamp(min=1)).to(load.device)
        record.load.pop(adapter)


class StepWatch:
    """Closes the step of one model's records whenever an optimizer has stepped; ``remove`` ends it.

    It holds the records weakly through their owner, so that it keeps no model alive.
    """

    def __init__(self, owner: Any) -> None:
        watched = weakref.ref(owner)

        def close(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            state = watched()
            if state is not None and _steps(optimizer, state.adapter_parameters()):
                close_step(state.records)

        self._handle = register_optimizer_step_post_hook(close)
        weakref.finalize(owner, self._handle.remove)

    def remove(self) -> None:
        """Stop listening."""
        self._handle.remove()


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Whether this is the optimizer of these parameters, and not another model's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # DeepSpeed hands flattened copies to its optimizer, and marks the parameters they came from.
    return any(id(p) in held or hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters)
