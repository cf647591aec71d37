"""Which files of a folder go to the Hub, and what keeps them from going."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5")
OPTIMIZER_STATES = ("optimizer*", "scheduler*", "rng_state*", "scaler.pt")
CHECKPOINTS = ("checkpoint-*", "global_step*")
_NEVER = (".*", "__pycache__", "*.partial", "*.lock")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_INDEX = "model.safetensors.index.json"
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_SEARCHED_BYTES = 5_000_000


class FolderError(ValueError):
    """A folder that may not be pushed as it is."""


@dataclass(frozen=True)
class UploadFile:
    """A file that goes up, with what the Hub will say of it."""

    path: str
    place: Path
    size: int
    content: bytes | None = None  # where other than at its place

    def sha256(self) -> str:
        """Hash that the Hub names a large file by."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        with self.place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def git_oid(self) -> str:
        """Hash that git, and so the Hub, names a small file by."""
        content = self.place.read_bytes() if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def list_upload(
    folder: Path, include_checkpoints: bool = False, exclude: Sequence[str] = ()
) -> tuple[list[UploadFile], list[str]]:
    """What goes up, and what stays.

    Args:
        folder: Of a saved adapter or model.
        include_checkpoints: Also `checkpoint-*` folders with their optimizer states, which are pickles.
        exclude: Further patterns of names of files or of top folders that stay.

    Returns:
        The files in order of their path, and the paths left out; of a folder left out only its name.

    Raises:
        FolderError: No model, no safetensors, a file that is not whole, or a token in a file.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder. Give the folder of a saved adapter or model.")
    files: list[UploadFile] = []
    left_out: list[str] = []
    for place in sorted(folder.rglob("*")):
        parts = place.relative_to(folder).parts
        if any(parts[: i + 1] == Path(kept).parts for kept in left_out for i in range(len(parts))):
            continue
        if _stays(parts, include_checkpoints, exclude):
            left_out.append("/".join(parts))
        elif place.is_file():
            files.append(UploadFile("/".join(parts), place, place.stat().st_size))
    check_files(folder, files)
    return files, left_out


def _stays(parts: tuple[str, ...], include_checkpoints: bool, exclude: Sequence[str]) -> bool:
    name, top = parts[-1], parts[0]
    if any(fnmatch(name, pattern) for pattern in _NEVER) or any(fnmatch(top, pattern) for pattern in exclude):
        return True
    if any(fnmatch(top, pattern) for pattern in CHECKPOINTS):
        return not include_checkpoints
    return any(fnmatch(name, pattern) for pattern in (*PICKLES, *OPTIMIZER_STATES))


def check_files(folder: Path, files: Sequence[UploadFile]) -> None:
    """Refuse a folder without a model, with weights that are pickled or cut off, or with a token in it.

    Raises:
        FolderError: One of these.
    """
    paths = {file.path for file in files}
    if not paths & {"adapter_config.json", "config.json"}:
        raise FolderError(
            f"{folder} holds neither adapter_config.json nor config.json. Give the folder that save_pretrained wrote."
        )
    if not paths & {*_WEIGHTS, _INDEX}:
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        found = f"only pickles ({', '.join(sorted(pickled))}), which can run code when they are read" if pickled else "none"  # fmt: skip
        raise FolderError(
            f"{folder} must hold its weights as safetensors; it has {found}. Save with safe_serialization=True."
        )
    if _INDEX in paths:
        shards = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shards - paths):
            raise FolderError(f"{folder / _INDEX} names {', '.join(missing)}, which is not there. Save the model anew.")
    for file in files:
        if file.path.endswith(".safetensors"):
            _check_header(file)
        elif file.size <= _SEARCHED_BYTES and _TOKEN.search(file.place.read_bytes()):
            raise FolderError(
                f"{file.place} holds what looks like a token of the Hub. Take it out before anybody reads it."
            )


def _check_header(file: UploadFile) -> None:
    """The header of a safetensors file against its length: a copy that was cut off is found here."""
    with file.place.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, file.size)))
            end = max(
                (tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(
                f"{file.place} is no safetensors file: its header cannot be read. Save it anew."
            ) from error
    if 8 + length + end != file.size:
        raise FolderError(f"{file.place} must be {8 + length + end} bytes long; it is {file.size}. Save it anew.")
