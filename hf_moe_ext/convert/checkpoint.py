"""Safetensors checkpoints, tensor by tensor: read by name from any number of shards, write shards of bounded size.

Knows nothing of models. A reader holds no weight; a writer holds at most one shard.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000


class CheckpointReader:
    """The tensors of a checkpoint folder by name; each is read when asked for.

    Attributes:
        folder: the checkpoint.
        names: every tensor, in the order of the shards.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """List the tensors of all shards.

        Raises:
            FileNotFoundError: no safetensors file, or a shard that the index names is missing.
            ValueError: a shard that is not safetensors, or does not hold what the index says.
        """
        self.folder = Path(folder)
        self._shard_of: dict[str, Path] = {}
        self._open_shard: tuple[Path, Any] | None = None
        for shard in self._list_shards():
            for name in self._open(shard).keys():  # noqa: SIM118 (a handle, not a dictionary)
                self._shard_of[name] = shard
        missing = sorted(set(self._indexed) - set(self._shard_of))
        if missing:
            raise ValueError(
                f"checkpoint {self.folder}: {INDEX_FILE} lists {missing[0]!r} and {len(missing) - 1} more that no shard "
                "holds; download it again"
            )

    @property
    def names(self) -> list[str]:
        """Every tensor, in the order of the shards."""
        return list(self._shard_of)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._shard_of

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the type it is stored in.

        Raises:
            KeyError: there is none of this name.
        """
        return self._open(self._shard(name)).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._open(self._shard(name)).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors names it ("F32", "BF16", ...), without reading it."""
        return str(self._open(self._shard(name)).get_slice(name).get_dtype())

    def _shard(self, name: str) -> Path:
        if name not in self._shard_of:
            raise KeyError(f"checkpoint {self.folder} holds no tensor {name!r}")
        return self._shard_of[name]

    def _list_shards(self) -> list[Path]:
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        self._indexed: dict[str, str] = {}
        if index.is_file():
            try:
                self._indexed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index of a checkpoint: {error!r}; download it again") from error
            shards = [self.folder / name for name in dict.fromkeys(self._indexed.values())]
        elif single.is_file():
            shards = [single]
        else:
            others = ", ".join(sorted(p.name for p in self.folder.glob("*.bin"))) or "no weights"
            raise FileNotFoundError(
                f"checkpoint {self.folder}: needs {SINGLE_FILE} or {INDEX_FILE}, found {others}. Pickled weights are "
                "never read: open the model once and call save_pretrained, which writes safetensors"
            )
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"checkpoint {self.folder}: {INDEX_FILE} names {shard.name}, which is missing")
        return shards

    def _open(self, shard: Path) -> Any:
        # One at a time: pages of a mapped file count as memory of the process until the file is closed.
        if self._open_shard is None or self._open_shard[0] != shard:
            try:
                self._open_shard = (shard, safe_open(shard, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"checkpoint shard {shard} is not a readable safetensors file: {error}") from error
        return self._open_shard[1]


class CheckpointWriter:
    """Writes tensors into shards of bounded size and, on leaving the context, their names and index.

    Use it inside `write_folder`: what it writes has its final names only at the end.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        """Start with an empty shard.

        Args:
            folder: an existing folder.
            max_shard_bytes: a shard is closed before it would grow beyond this; a larger tensor has its own.

        Raises:
            ValueError: max_shard_bytes below 1.
        """
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1; got {max_shard_bytes!r}")
        self.folder, self.max_shard_bytes = Path(folder), max_shard_bytes
        self.num_parameters = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def write(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; a full shard goes to disk.

        Raises:
            ValueError: the name was written before.
        """
        if name in self._pending or any(name in shard for shard in self._shards):
            raise ValueError(f"tensor {name!r} was written twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        # A view would be saved with all of its storage, or refused.
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size
        self.num_parameters += tensor.numel()

    @property
    def num_bytes(self) -> int:
        """Of all tensors written so far."""
        return self._total_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"could not write {self._pending_bytes:,} bytes to {path.parent}: {error}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.part"

    def _finish(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE_FILE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def write_folder(final: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name if the block ends well, and vanishes if it does not.

    A process killed in between leaves a hidden `.building-*` folder and nothing under the final name.

    Args:
        final: where the finished folder goes; its parents are created.
        overwrite: replace an existing folder (at the end, in two renames).

    Raises:
        FileExistsError: `final` exists and `overwrite` is False, or it is a file.
    """
    target = Path(final)
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".building-{target.name}-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's own is for its owner alone
        if not target.exists():
            staging.rename(target)
            return
        check_target(target, overwrite)  # it may have appeared meanwhile
        old = Path(tempfile.mkdtemp(prefix=f".replaced-{target.name}-", dir=target.parent))
        target.rename(old / target.name)
        staging.rename(target)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, overwrite: bool, keep: Path | None = None) -> None:
    """Refuse a taken output before any work is done.

    Args:
        target: the output folder.
        overwrite: whether a model's folder, or an empty one, may be replaced; never anything else.
        keep: a folder that is read from, so the output may not be it or hold it.

    Raises:
        FileExistsError: see `write_folder`.
    """
    if target.is_file():
        raise FileExistsError(f"output {target} is a file; name a folder")
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"output {target} exists; name a new folder, or ask for it with overwrite (--overwrite)")
    whole = target.resolve()
    for kept, what in ((Path.cwd(), "the current folder"), (keep, "the model that is read")):
        if kept is not None and kept.resolve().is_relative_to(whole):
            raise FileExistsError(f"output {target} is or holds {what}; name another folder")
    if any(whole.iterdir()) and not (whole / "config.json").is_file():
        raise FileExistsError(
            f"output {target} is no model's folder (no config.json), so it is not replaced; name another"
        )


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation settings, chat templates and licence; weights and config.json stay behind.

    Returns:
        Names of the files copied.
    """
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        wanted = name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template"))
        if path.is_file() and (wanted or name in ("generation_config.json", "spiece.model", "LICENSE")):
            shutil.copyfile(path, target / name)
            copied.append(name)
        elif path.is_dir() and name == "additional_chat_templates":
            shutil.copytree(path, target / name)
            copied.append(name)
    return copied
