"""What a delta folder holds: the changes between two checkpoints of one model, and the hashes that guard them.

::

    delta/
      delta.json           format and its version, hash of every tensor before and after, list of changes
      delta.safetensors    the changes
      base/, new/          side files (config.json, tokenizer ...) that differ, as they were and as they are

A change is one tensor, or one expert's part of a stack. Without loss it is stored as the exclusive or of the two bit
patterns, which leads from either to the other: so the base is not touched and not needed to go back, and applied twice it is
byte-equal by construction. Bits that did not change are 0, so the bytes are ordered by significance and packed by zlib,
which for a small update of a bfloat16 expert takes off most of one of its two bytes. With loss (an `Encoding`) the
difference is a code of `ops.deltas`; there is no way back from it but the base itself.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_ext.convert.checkpoint import INDEX_FILE
from hf_moe_ext.convert.streaming_reader import StreamingReader

FORMAT, FORMAT_VERSION = "hf_moe_ext.delta", 1
JSON_FILE, TENSOR_FILE = "delta.json", "delta.safetensors"
BASE_FILES, NEW_FILES = "base", "new"
XOR = "xor"


@dataclass
class Change:
    """One tensor, or one expert's part of it, that differs.

    Attributes:
        tensor: its name.
        expert: index along the first axis of a stack; None for the whole tensor.
        kind: "xor", or the kind of a code.
        metadata: of a code; None for "xor".
    """

    tensor: str
    expert: int | None
    kind: str = XOR
    metadata: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """Name of its tensors in the delta's file."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"


@dataclass
class DeltaDescription:
    """All of delta.json.

    Attributes:
        base_hashes: tensor -> hash before.
        new_hashes: tensor -> hash after; with loss, None where a code stands for it.
        changes: what differs.
        base_files: side files that differ or are only there before.
        new_files: side files that differ or are only there after.
        encoding: settings of a lossy encoding; None without loss.
        delta_hash: of delta.safetensors: with loss, no hash of the result could tell that a code is damaged.
    """

    base_hashes: dict[str, str] = field(default_factory=dict)
    new_hashes: dict[str, str | None] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    base_files: list[str] = field(default_factory=list)
    new_files: list[str] = field(default_factory=list)
    encoding: dict[str, Any] | None = None
    delta_hash: str = ""

    @property
    def lossless(self) -> bool:
        """Whether it leads back too."""
        return all(change.kind == XOR for change in self.changes)

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write delta.json and delta.safetensors."""
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        self.delta_hash = _hash_file(folder / TENSOR_FILE)
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        (folder / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> tuple[DeltaDescription, dict[str, Tensor]]:
    """The description and the tensors of a delta folder.

    Raises:
        FileNotFoundError: it is no delta folder.
        ValueError: another format or version, damaged files, or a file outside its folder.
    """
    for name in (JSON_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; give a folder that `hf-moe delta diff` wrote")
    try:
        content = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSOR_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"delta {folder} is damaged ({error}); write it again") from error
    found = (content.pop("format", None), content.pop("format_version", None))
    if found != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"delta {folder} is of format {found[0]!r} version {found[1]!r}, this release reads {FORMAT} version "
            f"{FORMAT_VERSION}; read it with the release that wrote it"
        )
    try:
        content["changes"] = [Change(**change) for change in content["changes"]]
        description = DeltaDescription(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"delta {folder}: {JSON_FILE} is damaged ({error}); write it again") from error
    if _hash_file(folder / TENSOR_FILE) != description.delta_hash:
        raise ValueError(
            f"delta {folder}: {TENSOR_FILE} has another hash than {JSON_FILE} says; it is damaged, write it again"
        )
    # A delta may come from anywhere: its files go into the output folder and nowhere else.
    for name in (*description.base_files, *description.new_files):
        if Path(name).name != name:
            raise ValueError(f"delta {folder}: {JSON_FILE} names {name!r}, which is no file of a checkpoint folder")
    return description, tensors


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensor(reader: StreamingReader, name: str) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    place = reader.places[name]
    digest = hashlib.sha256(f"{place.dtype} {place.shape}".encode())
    digest.update(to_bytes(reader.read(name)))
    return digest.hexdigest()


def to_bytes(tensor: Tensor) -> memoryview:
    """Its bytes as they are stored."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def pack_xor(before: Tensor, after: Tensor) -> Tensor:
    """Exclusive or of two tensors' bits, uint8 [packed bytes]."""
    width = before.element_size()
    bits = _as_bytes(before) ^ _as_bytes(after)
    ordered = bits.view(-1, width).T.contiguous()
    return torch.frombuffer(bytearray(zlib.compress(ordered.numpy().tobytes(), 1)), dtype=torch.uint8)


def unpack_xor(packed: Tensor, tensor: Tensor) -> Tensor:
    """The other tensor of the two that ``pack_xor`` was given.

    Raises:
        ValueError: it is not of a tensor of this size.
    """
    try:
        content = bytearray(zlib.decompress(packed.numpy().tobytes()))
    except zlib.error as error:
        raise ValueError(f"delta is damaged ({error}); write it again") from error
    given = _as_bytes(tensor)
    if len(content) != len(given):
        raise ValueError(f"delta is of {len(content)} bytes, the tensor has {len(given)}; the file is damaged")
    width = tensor.element_size()
    bits = torch.frombuffer(content, dtype=torch.uint8).view(width, -1).T.reshape(-1)
    return (given ^ bits).view(tensor.dtype).view(tensor.shape)


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the first axis of a tensor is its experts: stacked matrices, and deltas of a shared base."""
    return ".experts." in name and (len(shape) == 3 or ".experts.delta_" in name)


def side_files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint but its weights and their index, which are the layout's."""
    paths = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {p.name: p for p in paths if p.suffix != ".safetensors" and p.name != INDEX_FILE}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
