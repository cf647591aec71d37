"""Start another program so that every Python in it knows our PEFT types: ``hf-moe run``.

The program replaces this process, so its exit code, its signals and its terminal are its own. It inherits a
``PYTHONPATH`` that begins with a folder of ours, whose ``sitecustomize.py`` imports ``hf_moe_ext`` (cheap: no torch) as
each Python starts: the program's own, and those of its children (``accelerate launch``, spawned workers). A Python told
to ignore the environment (``-I``, ``-E``, ``-S``) does not.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

STARTUP_FOLDER = Path(__file__).resolve().parent / "startup"


class CommandError(Exception):
    """The command cannot be started; the message says why and what to write instead."""


def find_program(command: str) -> str:
    """Path of a program: of this Python's own environment first, activated or not, then of ``PATH``.

    Raises:
        CommandError: there is none.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command, path=path)
    if program is not None:
        return program
    if command.endswith(".py") and Path(command).is_file():
        raise CommandError(f"{command} is a script, not a program; write: hf-moe run -- python {command} ...")
    raise CommandError(
        f"no program {command!r} in {sysconfig.get_path('scripts')} or on PATH; install the package that brings it into "
        "this environment, or write: hf-moe run -- python -m MODULE ..."
    )


def startup_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables under which every Python imports ``hf_moe_ext`` first."""
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    ours = str(STARTUP_FOLDER)
    return {**environment, "PYTHONPATH": os.pathsep.join([ours, *(entry for entry in entries if entry != ours)])}


def run_program(command: Sequence[str]) -> NoReturn:
    """Replace this process by the command.

    Args:
        command: the program's name or path, then its arguments.

    Raises:
        CommandError: there is no such program, or the system refuses to start it.
    """
    program = find_program(command[0])
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        # The whole path: a Python started under a bare name looks itself up on PATH, and may find another one.
        os.execve(program, [program, *command[1:]], startup_environment(os.environ))
    except OSError as error:
        raise CommandError(f"{program} cannot be started: {error.strerror}") from error
