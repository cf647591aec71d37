"""Cells of a study, several processes side by side; a process leaves when the study is killed."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

CellT = TypeVar("CellT")


def run_in_processes(
    run: Callable[[CellT], dict[str, Any]],
    cells: Sequence[CellT],
    num_processes: int,
    num_threads: int,
    report: Callable[[int, CellT, dict[str, Any]], None],
) -> None:
    """Run every cell; what is not begun is dropped when one fails.

    Args:
        run: Cell -> record; a function that pickles.
        cells: In the order they are begun.
        num_processes: Cells at a time.
        num_threads: Threads of each.
        report: Called with 1, 2, ..., the cell and its record as they finish.
    """
    # The processes inherit it; set in them it would come after the threads have been started.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_leave_with_parent) as pool:
        runs = {pool.submit(run, cell): cell for cell in cells}
        try:
            for number, done in enumerate(as_completed(runs), 1):
                report(number, runs[done], done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_with_parent() -> None:
    """A process of the pool would wait for work for ever if the study is killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
