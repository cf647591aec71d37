"""``diff_checkpoints``, ``apply_delta``, ``revert_delta``: updates of a checkpoint as small files beside an untouched base."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_moe_ext.convert.checkpoint import check_target, write_folder
from hf_moe_ext.convert.delta_encoding import Encoding
from hf_moe_ext.convert.delta_files import (
    BASE_FILES,
    NEW_FILES,
    XOR,
    Change,
    DeltaDescription,
    hash_tensor,
    is_stack,
    pack_xor,
    read_description,
    side_files,
    to_bytes,
    unpack_xor,
)
from hf_moe_ext.convert.streaming_reader import StreamingReader
from hf_moe_ext.ops.delta_measures import form_delta, merge_out
from hf_moe_ext.ops.delta_positions import MaskStream
from hf_moe_ext.ops.deltas import read_delta


@dataclass
class DeltaReport:
    """What a diff found, or an apply or revert wrote.

    Attributes:
        output: the folder.
        changes: tensors, or experts of stacks, that differ.
        num_tensors: of the checkpoint.
        delta_bytes: size of the delta's tensors on disk.
        checkpoint_bytes: size of the checkpoint's.
        lossless: whether the delta leads back too.
        side_files: other files that differ.
    """

    output: str
    changes: list[str]
    num_tensors: int
    delta_bytes: int
    checkpoint_bytes: int
    lossless: bool
    side_files: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The same to read."""
        kind = "without loss" if self.lossless else "with loss: it does not lead back"
        files = f"; other files: {', '.join(self.side_files)}" if self.side_files else ""
        return (
            f"{len(self.changes)} changes in {self.num_tensors} tensors, {kind}{files}\n"
            f"delta {self.delta_bytes:,} bytes, checkpoint {self.checkpoint_bytes:,} "
            f"({self.delta_bytes / max(1, self.checkpoint_bytes):.1%})\nwritten to {self.output}"
        )


def diff_checkpoints(
    base: str | os.PathLike[str],
    new: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    encoding: Encoding | None = None,
    seed: int = 0,
) -> DeltaReport:
    """Write what differs between two checkpoints of one model: tensors, single experts of stacks, side files.

    Args:
        base: folder of the checkpoint that stays as it is.
        new: folder of the other; the same tensors, in any shards.
        output: folder to write.
        encoding: store experts' matrices that changed with loss (a stacked gate_up as one matrix); all else, and everything
            with None, is stored bit for bit.
        seed: of a random drop's positions.

    Raises:
        ValueError: not the same model: what differs is named.
        FileExistsError: the output exists.
        FileNotFoundError: no safetensors weights.
    """
    target = Path(output)
    check_target(target, False)
    before, after = StreamingReader(base), StreamingReader(new)
    _check_same_model(before, after)
    description = DeltaDescription(encoding=None if encoding is None else {**asdict(encoding), "seed": seed})
    tensors: dict[str, Tensor] = {}
    for name in before.names:
        known = description.base_hashes[name] = hash_tensor(before, name)
        found = hash_tensor(after, name)
        description.new_hashes[name] = found
        for change in _find_changes(before, after, name) if found != known else ():
            tensors |= _encode(before, after, change, encoding, seed, len(description.changes))
            description.changes.append(change)
            if change.kind != XOR:
                description.new_hashes[name] = None
    with write_folder(target) as staging:
        _write_side_files(before.folder, after.folder, staging, description)
        description.write(staging, tensors)
    files = sorted({*description.base_files, *description.new_files})
    return _report(target, target, description, before, files)


def apply_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> DeltaReport:
    """Write the new checkpoint from its base and a delta, in the shards of the base; the base stays as it is.

    Where the new checkpoint had the same shards, its files come out byte for byte.

    Raises:
        ValueError: a base that is not the delta's by hash, a damaged delta, a result that is not what was stored.
        FileExistsError: the output exists.
        FileNotFoundError: no weights, or no delta.
    """
    return _patch(Path(base), Path(delta), Path(output), overwrite, forward=True)


def revert_delta(
    new: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> DeltaReport:
    """Write the base back from the new checkpoint and a delta; what ``apply_delta`` wrote gives the base's files back.

    Raises:
        ValueError: as ``apply_delta``; also a delta with loss, which does not lead back.
        FileExistsError: the output exists.
        FileNotFoundError: no weights, or no delta.
    """
    return _patch(Path(new), Path(delta), Path(output), overwrite, forward=False)


def _patch(source: Path, delta: Path, target: Path, overwrite: bool, forward: bool) -> DeltaReport:
    for kept in (source, delta):
        check_target(target, overwrite, keep=kept)
    description, tensors = read_description(delta)
    if not forward and not description.lossless:
        raise ValueError(
            f"delta {delta} was encoded with loss, so it does not lead back; its base was never touched: use that"
        )
    reader = StreamingReader(source)
    hashes: tuple[dict[str, Any], dict[str, Any]] = (description.base_hashes, description.new_hashes)
    given, wanted = hashes if forward else hashes[::-1]
    _check_hashes(reader, given, delta, "base" if forward else "new checkpoint")
    with write_folder(target, overwrite) as staging:
        for path in (*reader.shards, *(p for p in source.iterdir() if p.name.endswith(".index.json"))):
            shutil.copyfile(path, staging / path.name)
        for number, change in enumerate(description.changes):
            place = reader.places[change.tensor]
            part = _read(reader, change)
            start = place.start + (change.expert or 0) * part.numel() * part.element_size()
            with (staging / place.path.name).open("r+b") as file:
                file.seek(start)
                file.write(to_bytes(_decode(part, change, tensors, number)))
        _check_result(staging, description, wanted)
        leave, take = (description.base_files, description.new_files)[:: 1 if forward else -1]
        for name, path in side_files(source).items():
            if name not in leave:
                shutil.copyfile(path, staging / name)
        for name in take:
            shutil.copyfile(delta / (NEW_FILES if forward else BASE_FILES) / name, staging / name)
    return _report(target, delta, description, reader, sorted({*leave, *take}))


def _check_same_model(before: StreamingReader, after: StreamingReader) -> None:
    if more := sorted(set(before.names) ^ set(after.names)):
        where = before.folder if more[0] in before else after.folder
        raise ValueError(
            f"only {where} holds {more[0]} ({len(more)} tensors are in one of the two): a delta needs two checkpoints of one "
            "model, with the same configuration"
        )
    for name, place in before.places.items():
        other = after.places[name]
        if (place.shape, place.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{name} is {place.shape} of {place.dtype} in {before.folder} and {other.shape} of {other.dtype} in "
                f"{after.folder}: a delta needs two checkpoints of one model, in one type"
            )


def _find_changes(before: StreamingReader, after: StreamingReader, name: str) -> Iterator[Change]:
    shape = before.places[name].shape
    if not is_stack(name, shape):
        yield Change(name, None)
        return
    for expert in range(shape[0]):
        change = Change(name, expert)
        if to_bytes(_read(before, change)) != to_bytes(_read(after, change)):
            yield change


def _encode(
    before: StreamingReader, after: StreamingReader, change: Change, encoding: Encoding | None, seed: int, number: int
) -> dict[str, Tensor]:
    left, right = _read(before, change), _read(after, change)
    matrix = left.ndim == 2 and left.is_floating_point() and ".experts." in change.tensor
    if encoding is None or not matrix or ".experts.delta_" in change.tensor:
        return {change.label: pack_xor(left, right)}
    stream = MaskStream(seed, number)
    code = encoding.fill_in((left.shape[0], left.shape[1])).encode(form_delta(right, left), stream, left.dtype)
    change.metadata = code.metadata()
    change.kind = change.metadata["kind"]
    return {f"{change.label}.{part}": tensor.contiguous() for part, tensor in code.tensors().items()}


def _decode(part: Tensor, change: Change, tensors: dict[str, Tensor], number: int) -> Tensor:
    if change.kind == XOR:
        if change.label not in tensors:
            raise ValueError(f"delta lacks change {number}, {change.label}; the file is damaged, write it again")
        return unpack_xor(tensors[change.label], part)
    prefix = f"{change.label}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    code = read_delta(own, change.metadata or {}, (part.shape[0], part.shape[1]))
    return merge_out(part, code.decode(), part.dtype)


def _read(reader: StreamingReader, change: Change) -> Tensor:
    if change.expert is None:
        return reader.read(change.tensor)
    return reader.read_rows(change.tensor, change.expert, change.expert + 1)[0]


def _check_hashes(reader: StreamingReader, wanted: dict[str, str], delta: Path, what: str) -> None:
    if set(wanted) != set(reader.names):
        name = sorted(set(wanted) ^ set(reader.names))[0]
        raise ValueError(f"{reader.folder} is not the {what} of delta {delta}: {name} is only in one of the two")
    for name, known in wanted.items():
        if hash_tensor(reader, name) != known:
            raise ValueError(
                f"{reader.folder} is not the {what} of delta {delta}: {name} has another hash; nothing was written"
            )


def _check_result(staging: Path, description: DeltaDescription, wanted: dict[str, str | None]) -> None:
    reader = StreamingReader(staging)
    for name in dict.fromkeys(change.tensor for change in description.changes):
        if wanted[name] is not None and hash_tensor(reader, name) != wanted[name]:
            raise ValueError(f"{name} did not come out as it was stored: the delta is damaged; write it again")


def _write_side_files(base: Path, new: Path, staging: Path, description: DeltaDescription) -> None:
    before, after = side_files(base), side_files(new)
    differing = [
        name
        for name in sorted({*before, *after})
        if name not in before or name not in after or before[name].read_bytes() != after[name].read_bytes()
    ]
    for folder, files, names in (
        (BASE_FILES, before, description.base_files),
        (NEW_FILES, after, description.new_files),
    ):
        for name in differing:
            if name in files:
                (staging / folder).mkdir(exist_ok=True)
                shutil.copyfile(files[name], staging / folder / name)
                names.append(name)


def _report(
    target: Path, delta: Path, description: DeltaDescription, reader: StreamingReader, files: list[str]
) -> DeltaReport:
    labels = [change.label for change in description.changes]
    size = (delta / "delta.safetensors").stat().st_size
    return DeltaReport(str(target), labels, len(reader.names), size, reader.file_bytes, description.lossless, files)
