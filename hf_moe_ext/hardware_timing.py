"""``hf-moe measure-hardware``: times what the cost model asks about on the machine it runs on, and makes a row of it.

Best of several repetitions, after one that warms up: a row holds what the device can do, and efficiencies below 1 what a
model makes of it. Under torchrun all ranks measure together, and their all-to-all is timed too.
"""

import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_moe_ext.scaling.hardware import Hardware, write_hardware

Size = Literal["small", "full"]
# Rows and width of products; bytes of a copy; bytes of an all-to-all on a rank. "small" is for tests and a first look.
PRODUCT = {"small": 256, "full": {"cpu": 2048, "cuda": 8192}}
COPY_BYTES = {"small": 2**22, "full": {"cpu": 2**28, "cuda": 2**31}}
WIRE_BYTES = {"small": 2**18, "full": {"cpu": 2**25, "cuda": 2**28}}
NUM_EXPERTS = 8
REPETITIONS = 5


def measure_hardware(
    name: str, *, device: str | None = None, dtype: str | None = None, size: Size = "full", output: Path | None = None
) -> Hardware:  # fmt: skip
    """Time products, grouped products, memory and, under torchrun, all-to-all; rank 0 writes the row.

    Args:
        name: of the row.
        device: "cpu" or "cuda"; None: CUDA where there is one.
        dtype: of products; None: bfloat16 on CUDA, float32 on a CPU.
        size: how much is multiplied and moved.
        output: file that the row is added to; None: none.

    Raises:
        ValueError: no such device or dtype, or a file that is no hardware file.
        OSError: the file cannot be written.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda on a machine that has it, got {kind!r}")
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    chosen = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if chosen not in types:
        raise ValueError(f"dtype must be one of {', '.join(types)}, got {chosen!r}")
    with _Ranks(kind) as ranks:
        width = _pick(PRODUCT, size, kind)
        row = Hardware(
            name=name,
            flops_per_s=time_product(ranks.device, types[chosen], width),
            grouped_flops_per_s=time_grouped_product(ranks.device, types[chosen], width),
            memory_bytes=_memory_bytes(kind),
            memory_bytes_per_s=time_copy(ranks.device, _pick(COPY_BYTES, size, kind)),
            devices_per_node=ranks.local_size,
            source=f"measured by hf-moe measure-hardware: {_describe(kind)}, {chosen}, torch {torch.__version__}",
            **ranks.time_links(_pick(WIRE_BYTES, size, kind)),
        )
        if output is not None and ranks.rank == 0:
            write_hardware(row, output)
    return row


def is_first_rank() -> bool:
    """Whether this process is alone or torchrun's rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def time_product(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of [width, width] times [width, width]."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / _fastest(lambda: a @ b, device)


def time_grouped_product(device: torch.device, dtype: torch.dtype, width: int) -> float | None:
    """FLOP/s of the same FLOPs in groups of equal size, ``torch.nn.functional.grouped_mm``; None where it has no kernel."""
    inner = width // NUM_EXPERTS
    rows = torch.randn(width * NUM_EXPERTS // 2, width, device=device).to(dtype)
    weights = torch.randn(NUM_EXPERTS, width, inner, device=device).to(dtype)
    each = len(rows) // NUM_EXPERTS
    ends = torch.arange(1, NUM_EXPERTS + 1, device=device, dtype=torch.int32) * each
    try:
        seconds = _fastest(lambda: F.grouped_mm(rows, weights, offs=ends), device)
    except NotImplementedError:  # and nothing else: too little memory is no missing kernel
        return None
    return 2 * len(rows) * width * inner / seconds


def time_copy(device: torch.device, num_bytes: int) -> float:
    """Bytes per second read and written by a copy."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


class _Ranks:
    """The process group that torchrun's variables ask for; one process alone without them."""

    def __init__(self, kind: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        alone = max(1, torch.cuda.device_count()) if kind == "cuda" else 1
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", alone))
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        self.own_group = False

    def __enter__(self) -> "_Ranks":
        if self.size > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group(backend, timeout=timedelta(minutes=5))
            self.own_group = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.own_group:
            dist.destroy_process_group()

    def time_links(self, num_bytes: int) -> dict[str, Any]:
        """Bytes per second that a rank sends to others of its node, and of other nodes; none alone."""
        if self.size == 1:
            return {}
        num_nodes = self.size // self.local_size
        # Every rank takes part in making every group.
        groups = [dist.new_group(range(n * self.local_size, (n + 1) * self.local_size)) for n in range(num_nodes)]
        links: dict[str, Any] = {}
        if self.local_size > 1:
            seconds = self._time_all_to_all(num_bytes, groups[self.rank // self.local_size], self.local_size)
            links["intra_node_bytes_per_s"] = num_bytes * (self.local_size - 1) / self.local_size / seconds
        if num_nodes > 1:
            seconds = self._time_all_to_all(num_bytes, None, self.size)
            links["inter_node_bytes_per_s"] = num_bytes * (self.size - self.local_size) / self.size / seconds
        return links

    def _time_all_to_all(self, num_bytes: int, group: Any, num_ranks: int) -> float:
        """Seconds of the slowest rank."""
        rows = torch.zeros(num_bytes // 4 // num_ranks * num_ranks, device=self.device)
        arrived = torch.empty_like(rows)
        own = _fastest(lambda: dist.all_to_all_single(arrived, rows, group=group), self.device)
        slowest = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some repetitions, after one that warms up."""
    seconds = []
    for _ in range(REPETITIONS + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pick(table: dict[str, Any], size: Size, kind: str) -> int:
    entry = table[size]
    return int(entry[kind] if isinstance(entry, dict) else entry)


def _memory_bytes(kind: str) -> int:
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _describe(kind: str) -> str:
    if kind == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
