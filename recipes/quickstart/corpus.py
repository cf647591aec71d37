"""The source text of the running Python's standard library, split into train and held-out modules.

It is real human text that every machine with Python already has. The split is by top-level module (`asyncio` is on one
side as a whole), because files of one package share code and phrases, and by a hash of the name, so that it is the same
on every machine that has the same Python.
"""

import hashlib
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

# Not written by hand (character tables, grammars, bundled wheels), not part of every installation, or not the library.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
HELD_OUT_ONE_IN = 8
MINIMUM_BYTES = 2_000_000


@dataclass(frozen=True)
class Module:
    """One source file: its path below the library folder, with forward slashes, and its text."""

    name: str
    text: str

    @property
    def top_level(self) -> str:
        """The name one would import: `asyncio` of `asyncio/events.py`."""
        return self.name.split("/")[0].removesuffix(".py")


@dataclass(frozen=True)
class Corpus:
    """The modules to train on and the modules no training ever sees."""

    train: tuple[Module, ...]
    held_out: tuple[Module, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of every byte and of the split, so that a cached model is never used with another text."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            for module in side:
                digest.update(f"{module.name}\0{len(module.text)}\0{module.text}".encode())
            digest.update(b"\1")
        return digest.hexdigest()


def read_corpus(folder: str | os.PathLike[str] | None = None) -> Corpus:
    """Read and split the standard library.

    Args:
        folder: Library folder; None is the one of the running interpreter.

    Returns:
        The corpus, modules sorted by name.

    Raises:
        FileNotFoundError: There is too little source text (some installations ship byte code only).
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    modules = [module for path in _source_files(root) if (module := _read_module(path, root)) is not None]
    size = sum(len(module.text) for module in modules)
    if folder is None and size < MINIMUM_BYTES:
        raise FileNotFoundError(
            f"--dataset_name docstrings needs the source of the standard library, at least {MINIMUM_BYTES:,} bytes; "
            f"{root} holds {size:,}. Use a Python that ships its .py files, or give --dataset_name and "
            "--model_name_or_path."
        )
    return Corpus(
        train=tuple(module for module in modules if not is_held_out(module.top_level)),
        held_out=tuple(module for module in modules if is_held_out(module.top_level)),
    )


def is_held_out(top_level: str, purpose: str = "") -> bool:
    """Whether a top-level module is kept from training; depends on its name and the purpose alone.

    `_pydecimal` goes with `decimal`: private twins hold the same text.
    """
    public_name = top_level.strip("_").removeprefix("py")
    digest = hashlib.sha256(f"{purpose}{public_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    # Sorted by path text, not by the file system's order, which differs between machines.
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read_module(path: Path, root: Path) -> Module | None:
    try:
        with tokenize.open(path) as file:  # honours the file's own coding line
            text = file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None
    return Module(path.relative_to(root).as_posix(), text) if text.strip() else None
