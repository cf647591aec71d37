"""How many CPU cores there are for us; loads nothing."""

import os


def count_cores() -> int:
    """CPU cores that this process may use: a job of a scheduler, or under ``taskset``, has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
