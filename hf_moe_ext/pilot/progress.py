"""What runs, on the standard error: one bar per stage, none where nobody looks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """A context in which stages are shown.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=self.console, disable=quiet or not sys.stderr.isatty())
        self.lines = not quiet and not sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Show a stage; yields what is called with every finished arm."""
        task = self.bars.add_task(name, total=total)
        count = 0

        def done(result: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            self.bars.advance(task)
            if self.lines or result["status"] == "failed":
                self.console.print(f"{name} {count}/{total}: {_describe(result)}", soft_wrap=True)

        yield done
        self.bars.update(task, completed=total)


def _describe(result: dict[str, Any]) -> str:
    spec = result["spec"]
    rate = "" if spec["learning_rate"] is None else f" at {spec['learning_rate']:g}, {spec['max_steps']} steps"
    if result["status"] == "failed":
        return f"{spec['candidate']['name']}{rate} failed: {result['reason']}"
    seconds = result["measured"].get("wall_s")
    return f"{spec['candidate']['name']}{rate}: loss {result['deterministic']['loss']:.4f} in {seconds:.0f} s"
