"""What a pilot keeps on disk: JSON written whole or not at all, and the settings that a restart must share."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS, PLAN, RESULT, ARMS = "settings.json", "plan.json", "pilot.json", "arms"


class NoSpaceError(OSError):
    """The disk is full."""


def write_json(path: Path, content: Any) -> None:
    """Write beside `path` and move it there, so that a reader finds all of it or nothing.

    Raises:
        NoSpaceError: The disk is full; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with full_disk_told(path.parent):
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with full_disk_told(path.parent):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """A full disk as one message.

    Raises:
        NoSpaceError: The block ran out of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpaceError(
            error.errno,
            f"no space is left for {folder}. The arms that are finished are kept there: make room and give the same "
            "command again",
        ) from error


def claim_folder(folder: Path, settings: dict[str, Any]) -> bool:
    """Make the folder this pilot's own.

    Args:
        folder: The output folder.
        settings: What makes this pilot this one and no other.

    Returns:
        Whether an earlier run with the same settings is gone on with.

    Raises:
        ValueError: The folder holds another pilot, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file. Name a folder.")
    earlier = read_json(folder / SETTINGS)
    if earlier is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--output {folder} holds files that are no pilot's. Name a new or an empty folder.")
        write_json(folder / SETTINGS, settings)
        return False
    wanted = json.loads(json.dumps(settings))
    different = sorted(key for key in {*earlier, *wanted} if earlier.get(key) != wanted.get(key))
    if different:
        raise ValueError(
            f"--output {folder} holds a pilot with other settings ({', '.join(different)}). Name a new folder, or give "
            "that pilot's own command to go on with it."
        )
    return True
