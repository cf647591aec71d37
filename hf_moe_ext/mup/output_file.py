"""Files that a command writes: refused before the work where they cannot be, and written whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_output_file(option: str, path: Path) -> None:
    """Refuse a name under which no file can be written.

    Raises:
        ValueError: it is a folder, or lies below something that is none.
    """
    if path.is_dir():
        raise ValueError(f"{option} must be a file to write, got the folder {path}; name a file in it")
    parent = next((parent for parent in path.parents if parent.exists()), None)
    if parent is not None and not parent.is_dir():
        raise ValueError(f"{option} must lie in a folder, got {path}, but {parent} is a file; name another place")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then move it there; an error leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
