"""Sums over the processes of a run."""

from torch import Tensor, distributed


def sum_over_processes(counts: Tensor) -> Tensor:
    """The sum over all processes; the tensor itself where there is one."""
    # Not accelerate's reduce: its state is blind to a process group that somebody else has opened.
    if not (distributed.is_available() and distributed.is_initialized()):
        return counts
    counts = counts.clone()
    distributed.all_reduce(counts)
    return counts
