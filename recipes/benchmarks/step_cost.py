"""Time and memory of one training step: forward, backward, AdamW on whatever is trainable.

Memory is counted in two parts, the same on every device:

* resident bytes: parameters, buffers and optimizer state, from the tensors' own sizes (storages counted once);
* transient bytes: the highest sum of what the allocator handed out and has not got back since the step began, with no
  gradients at its start. On CUDA that is `max_memory_allocated` minus what was allocated before. On the CPU it is the
  running sum over the allocator's own records in `torch.profiler` (profile_memory), which see every buffer of every
  kernel, autograd's saved tensors and temporaries alike; a TorchDispatchMode sees only what kernels return.

The step that is profiled is never the step that is timed.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], Any]


@contextmanager
def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[Step, torch.optim.Optimizer | None]]:
    """A function that runs one step, and its optimizer (None where nothing trains); leaves no gradient behind.

    A model in bfloat16 runs under autocast, as with `Trainer(bf16=True)`, so that float32 adapters work in bfloat16.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # The learning rate is small: what full fine-tuning changes, every method sees.
    optimizer = torch.optim.AdamW(trainable, lr=1e-7, weight_decay=0.0) if trainable else None
    weight = next(model.parameters())

    def autocast() -> AbstractContextManager[Any]:
        half = weight.dtype == torch.bfloat16
        return torch.autocast(weight.device.type, torch.bfloat16) if half else nullcontext()

    def step() -> None:
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    try:
        yield step, optimizer
    finally:
        model.zero_grad(set_to_none=True)


def time_steps(step: Step, device: str, warmup: int, count: int) -> list[tuple[float, float]]:
    """(wall, processor) seconds of each of `count` steps, after `warmup` steps that do not count.

    Processor seconds are those of all threads of this process. They leave out the time in which another program had the
    core, so on a busy machine they say what the wall clock cannot; where the work is on a GPU they mean nothing.
    """
    seconds = []
    for i in range(warmup + count):
        _synchronize(device)
        wall, processor = time.perf_counter(), time.process_time()
        step()
        _synchronize(device)
        if i >= warmup:
            seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles as its spread."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def ratio_quartiles(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Of the ratio within each round."""
    return quartiles([a / b for a, b in zip(mine, theirs, strict=True)])


def profile_operations(step: Step, device: str) -> dict[str, float]:
    """Operation -> milliseconds of its own in one step, on the device that does the work; run a step before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        _synchronize(device)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {average.key: getattr(average, attribute) / 1e3 for average in profile.key_averages()}


def measure_transient_bytes(step: Step, device: str) -> int:
    """Most bytes that one step holds at a time beyond what was allocated before it; run a step before, to warm up."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _peak(_record_allocations(step))


def count_bytes(tensors: Any) -> int:
    """Bytes of the storages behind these tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def state_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The optimizer's moments."""
    if optimizer is None:
        return []
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def describe_device(device: str, threads: int) -> str:
    """What the steps ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def _record_allocations(step: Step) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) during the step, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    records = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    if not records:
        raise RuntimeError("torch.profiler recorded no allocation; memory cannot be measured with this build of torch")
    return [size for _, size in sorted(records, key=lambda record: record[0])]


def _peak(sizes: list[int]) -> int:
    highest = held = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
