"""What the commands agree on: options of one meaning, bad input as one message and exit code 2, how a report is printed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
OutputFolder = Annotated[str, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]

BAD_INPUT = (ValueError, TypeError, OSError)


class Report(Protocol):
    """What a command did."""

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        ...

    def as_text(self) -> str:
        """The same to read."""
        ...


def print_report(report: Report, as_json: bool) -> None:
    """Print a report for machines or for people."""
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.as_text())


@contextmanager
def refusal_of(
    command: str, kinds: tuple[type[Exception], ...] = BAD_INPUT, on_one_line: bool = False
) -> Iterator[None]:
    """Tell errors of the user's input as one message instead of a traceback.

    Args:
        command: Its words after ``hf-moe``.
        kinds: Errors that mean bad input.
        on_one_line: Print messages of several lines as one.

    Raises:
        typer.Exit: With code 2, for such an error.
    """
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split()) if on_one_line else str(error)
        typer.echo(f"hf-moe {command}: {message}", err=True)
        raise typer.Exit(2) from error
