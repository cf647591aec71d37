"""The writing side of the audit log: routing events in, parquet files out, with a bounded number of rows in memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_moe_ext.audit.events import RoutingEvent
from hf_moe_ext.audit.log_sampling import SampledBy, keep_tokens

LOG_VERSION = 1
FACTS_FILE, DATA_FOLDER = "audit_log.json", "data"
ROW_GROUP_ROWS = 4096

_COLUMNS = [
    ("layer", pa.string()),
    ("router", pa.string()),
    ("example", pa.string()),
    ("position", pa.int32()),
    ("slice", pa.string()),
    ("experts", pa.list_(pa.int32())),
    ("weights", pa.list_(pa.float32())),
]
_TEXT_COLUMNS = [("token_id", pa.int32()), ("token_text", pa.string())]


@dataclass
class _RouterFile:
    """One router's file, open for writing, and the rows that wait for it."""

    name: str
    layer: str
    router: str
    num_experts: int
    writer: pq.ParquetWriter
    waiting: list[pa.Table] = field(default_factory=list)
    num_waiting: int = 0
    num_rows: int = 0


class AuditLogWriter:
    """Writes which experts each token took: a listener for ``watch_routing``, and a context manager.

    One parquet file per router of a layer, so that a question about an expert reads nothing else. Rows wait in memory until a
    row group is full: at most ``row_group_rows`` of each router. The folder has its name only once it is whole; after an
    error nothing is left. In a run of several processes each needs a folder of its own.

    By default a log is redacted: it holds neither token texts nor token ids, which any tokenizer would turn back into text.
    Example ids and positions stay, so that who has the data can look the token up. Who has the model can still guess
    words from their experts, above all in the first layers: share a log as carefully as statistics of the text.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        decode: Callable[[int], str] | None = None,
        sample_rate: float = 1.0,
        sampled_by: SampledBy = "token",
        seed: int = 0,
        row_group_rows: int = ROW_GROUP_ROWS,
    ) -> None:
        """Check everything; the first file is opened at the first event.

        Args:
            folder: to write; must not exist, or be empty.
            decode: text of a token id. With it the log holds texts and ids; without, it is redacted.
            sample_rate: share of tokens (or examples) to keep, above 0, at most 1.
            sampled_by: draw tokens, or whole examples.
            seed: of the draw, which is the same for every layer, whatever the batches.
            row_group_rows: rows of a row group, and of what waits in memory for one router.

        Raises:
            ValueError: a value that cannot be used, or a folder that is taken.
        """
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be above 0 and at most 1, got {sample_rate}; 1 keeps every token")
        if sampled_by not in ("token", "example"):
            raise ValueError(f"sampled_by must be 'token' or 'example', got {sampled_by!r}")
        if row_group_rows < 1:
            raise ValueError(f"row_group_rows must be at least 1, got {row_group_rows}")
        self.folder = Path(folder)
        check_log_folder(self.folder)
        self._decode, self._texts = decode, dict[int, str]()
        self._sample_rate, self._sampled_by, self._seed = sample_rate, sampled_by, seed
        self._row_group_rows = row_group_rows
        self._schema = pa.schema(_COLUMNS + (_TEXT_COLUMNS if decode else []))
        self._staging: Path | None = None
        self._files: dict[tuple[str, str], _RouterFile] = {}
        self._seen_in_pass: set[tuple[str, str]] = set()
        self._first_example, self._num_examples = 0, 0

    def __enter__(self) -> Self:
        """Make the temporary folder."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix=f".writing-{self.folder.name}-", dir=self.folder.parent))
        self._staging.chmod(0o755)  # mkdtemp's own is for its owner alone
        (self._staging / DATA_FOLDER).mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what waits and give the folder its name; after an error, remove it."""
        assert self._staging is not None
        try:
            if error is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.writer.close()
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def __call__(self, event: RoutingEvent) -> None:
        """Add the tokens of one router in one forward pass."""
        if self._staging is None:
            raise ValueError("an AuditLogWriter is used in a with block; nothing can be written before or after it")
        table = self._read(event)
        file = self._file_of(event)
        file.waiting.append(table)
        file.num_waiting += table.num_rows
        while file.num_waiting >= self._row_group_rows:
            self._flush(file, self._row_group_rows)

    def _finish(self) -> None:
        assert self._staging is not None
        for file in self._files.values():
            self._flush(file, file.num_waiting)
            file.writer.close()
        facts = {
            "version": LOG_VERSION,
            "redacted": self._decode is None,
            "sample_rate": self._sample_rate,
            "sampled_by": self._sampled_by,
            "seed": self._seed,
            "routers": [
                {"file": f"{DATA_FOLDER}/{f.name}", "layer": f.layer, "router": f.router, "num_experts": f.num_experts,
                 "num_rows": f.num_rows}
                for f in self._files.values()
            ],
        }  # fmt: skip
        (self._staging / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self._staging.replace(self.folder)

    def _file_of(self, event: RoutingEvent) -> _RouterFile:
        key = (event.layer, event.router)
        if key not in self._files:
            assert self._staging is not None
            # Numbered: `datasets` reads words such as "test" in a file's name as the name of a split.
            name = f"part-{len(self._files):04d}.parquet"
            writer = pq.ParquetWriter(self._staging / DATA_FOLDER / name, self._schema, compression="zstd")
            self._files[key] = _RouterFile(name, event.layer, event.router, event.num_experts, writer)
        return self._files[key]

    def _flush(self, file: _RouterFile, num_rows: int) -> None:
        """Write the first rows that wait as one row group."""
        if not num_rows:
            return
        table = pa.concat_tables(file.waiting)
        file.writer.write_table(table.slice(0, num_rows), row_group_size=num_rows)
        # Taken, not sliced: a slice would hold the rows before it in memory.
        rest = table.take(np.arange(num_rows, table.num_rows))
        file.waiting, file.num_waiting = [rest], rest.num_rows
        file.num_rows += num_rows

    def _read(self, event: RoutingEvent) -> pa.Table:
        """The kept tokens of an event as a table."""
        batch = event.batch
        rows, positions = batch.rows.cpu().numpy(), batch.positions.cpu().numpy()
        examples = self._examples(event, rows, positions)
        # Where a model drops or packs tokens, rows are -1: nothing is known of them but their experts.
        known = bool(len(rows)) and int(rows.min()) >= 0
        places = positions if known else np.arange(len(rows))
        kept = keep_tokens(
            examples if known else ["?"], np.maximum(rows, 0), places, self._sample_rate, self._sampled_by, self._seed
        )
        if batch.mask is not None:
            kept &= batch.mask.cpu().numpy()
        chosen = np.flatnonzero(kept)
        names = [None if example is None else str(example) for example in examples] if known else [None]
        slices = list(batch.slices) if known and batch.slices is not None else [None] * len(names)
        of_row = pa.array(np.maximum(rows[chosen], 0))
        columns = {
            "layer": pa.repeat(event.layer, len(chosen)),
            "router": pa.repeat(event.router, len(chosen)),
            "example": pa.array(names, pa.string()).take(of_row),
            "position": pa.array(positions[chosen], pa.int32()),
            "slice": pa.array(slices, pa.string()).take(of_row),
            "experts": _lists(event.index.cpu().numpy()[chosen], pa.int32()),
            "weights": _lists(event.weights.float().cpu().numpy()[chosen], pa.float32()),
        }
        if self._decode is not None:
            ids = self._token_ids(event)[chosen]
            columns["token_id"] = pa.array(ids, pa.int32())
            columns["token_text"] = pa.array([self._text(int(i)) for i in ids], pa.string())
        return pa.table(columns, schema=self._schema)

    def _examples(self, event: RoutingEvent, rows: np.ndarray, positions: np.ndarray) -> list[int | str]:
        """Ids of the batch's examples; where nobody named them, rows are numbered over the passes seen."""
        if event.batch.examples is not None:
            return list(event.batch.examples)
        num_rows = int(rows.max()) + 1 if len(rows) else 0
        if event.batch.input_ids is not None:
            num_rows = len(event.batch.input_ids)
        first_of_pass = not self._seen_in_pass or (event.layer, event.router) in self._seen_in_pass
        self._seen_in_pass = (set() if first_of_pass else self._seen_in_pass) | {(event.layer, event.router)}
        # A pass of `generate` goes on with the sequences of the pass before it.
        if first_of_pass and (not len(positions) or int(positions.min()) <= 0):
            self._first_example, self._num_examples = self._num_examples, self._num_examples + num_rows
        return [self._first_example + row for row in range(num_rows)]

    def _token_ids(self, event: RoutingEvent) -> np.ndarray:
        ids = event.batch.input_ids
        if ids is None:
            raise ValueError("decode needs token ids, but the model was called with embeddings; leave the log redacted")
        flat = ids.reshape(-1).cpu().numpy()
        if len(flat) != len(event.index):
            raise ValueError(
                f"decode needs one routed row per token of the input, got {len(event.index)} rows of {len(flat)} tokens; "
                "leave the log redacted"
            )
        return flat

    def _text(self, token: int) -> str:
        if token not in self._texts:
            assert self._decode is not None
            self._texts[token] = self._decode(token)
        return self._texts[token]


def check_log_folder(folder: Path) -> None:
    """Refuse a folder that is taken.

    Raises:
        ValueError: a file, or a folder with something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"the audit log needs a folder of its own, got {folder}, which is taken; name another")


def _lists(values: np.ndarray, kind: Any) -> pa.ListArray:
    """Rows of equal length [rows, k] as a list column."""
    offsets = np.arange(0, values.size + 1, max(1, values.shape[1]), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1), kind))
