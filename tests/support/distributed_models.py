"""Models of a folder, whole on one process or spread over ranks. Apart from the rest, since ranks start faster for it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

Layout = dict[str, Any]  # arguments of DistributedConfig


def load(
    folder: Path, layout: Layout | None = None, implementation: str = "batched_mm", dtype: torch.dtype = torch.float64
) -> Any:
    """The model of a folder; without a layout, whole on this process."""
    kwargs = {} if layout is None else {"distributed_config": DistributedConfig(**layout)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation, **kwargs)
