"""The reading side of the audit log: what does expert 17 of layer 9 see?"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_moe_ext.audit.layer_number import layer_number
from hf_moe_ext.audit.log_writing import DATA_FOLDER, FACTS_FILE, LOG_VERSION, ROW_GROUP_ROWS, AuditLogWriter

__all__ = ["DATA_FOLDER", "FACTS_FILE", "LOG_VERSION", "ROW_GROUP_ROWS", "AuditLog", "AuditLogWriter", "LoggedToken"]


@dataclass(frozen=True)
class LoggedToken:
    """One token that took an expert.

    Attributes:
        example: id of its example.
        position: its place in the sequence.
        slice: of the data, where the log has slices.
        weight: what the expert's output was multiplied by.
        rank: 0 if the expert was the token's first choice.
        experts: all it took, with their ``weights``.
        token_id: None in a redacted log.
        token_text: None in a redacted log.
    """

    example: str
    position: int
    slice: str | None
    weight: float
    rank: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    token_id: int | None = None
    token_text: str | None = None


class AuditLog:
    """A log that ``AuditLogWriter`` wrote.

    Attributes:
        folder: where it is.
        redacted: whether token texts and ids were left out.
        sample_rate: share of the tokens, or examples, that it holds.
        routers: ``file``, ``layer``, ``router``, ``num_experts`` and ``num_rows`` of each.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.redacted: bool = facts["redacted"]
        self.sample_rate: float = facts["sample_rate"]
        self.routers: list[dict[str, Any]] = facts["routers"]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what a log says of itself; its data are read when asked for.

        Raises:
            ValueError: no log, or one of another version.
        """
        path = Path(folder) / FACTS_FILE
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            version = facts["version"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no audit log: {path} cannot be read ({error})") from error
        if version != LOG_VERSION:
            raise ValueError(
                f"the audit log {folder} has version {version}, this hf_moe_ext reads {LOG_VERSION}; write it anew"
            )
        return cls(Path(folder), facts)

    def dataset(self) -> Any:
        """The whole log as a ``datasets.Dataset``, one row per token and router."""
        from datasets import load_dataset

        files = [str(self.folder / one["file"]) for one in self.routers if one["num_rows"]]
        return load_dataset("parquet", data_files=files, split="train")

    def tokens_of(
        self, layer: int | str, expert: int, limit: int | None = 20, router: str = "base"
    ) -> list[LoggedToken]:
        """The first tokens, in the order they came, that took an expert. Reads that router's file, up to the last of them.

        Args:
            layer: number of the layer as in its module path ("model.layers.9.mlp.experts" is 9), or the whole path.
            expert: its number.
            limit: how many at most; None for all.
            router: "base", or the name of the adapter whose router is meant.

        Raises:
            ValueError: the log has no such layer, router or expert.
        """
        found: list[LoggedToken] = []
        for token in self._tokens(layer, expert, router):
            if limit is not None and len(found) >= limit:
                break
            found.append(token)
        return found

    def texts_of(self, layer: int | str, expert: int, limit: int = 20, router: str = "base") -> list[tuple[str, int]]:
        """The texts that took an expert most often, with how often; reads the router's whole file.

        Raises:
            ValueError: as ``tokens_of``, and for a redacted log.
        """
        if self.redacted:
            raise ValueError(f"the audit log {self.folder} is redacted: it holds no text. Write one with --show-text")
        return Counter(str(token.token_text) for token in self._tokens(layer, expert, router)).most_common(limit)

    def _tokens(self, layer: int | str, expert: int, router: str) -> Iterator[LoggedToken]:
        entry = self._find(layer, router)
        if not 0 <= expert < entry["num_experts"]:
            raise ValueError(f"expert must be from 0 to {entry['num_experts'] - 1} in {entry['layer']}, got {expert}")
        with pq.ParquetFile(self.folder / entry["file"]) as file:
            for group in range(file.num_row_groups):
                experts = file.read_row_group(group, columns=["experts"])["experts"].combine_chunks()
                # The other columns are read only where there is something to see.
                hits = _rows_with(experts, expert)
                if len(hits):
                    yield from (_token(row, expert) for row in file.read_row_group(group).take(hits).to_pylist())

    def _find(self, layer: int | str, router: str) -> dict[str, Any]:
        layers = list(dict.fromkeys(one["layer"] for one in self.routers))
        wanted = [name for name in layers if name == layer or layer_number(name) == layer]
        if not wanted:
            raise ValueError(f"the audit log has no layer {layer!r}; it has {', '.join(layers) or 'none'}")
        if len(wanted) > 1:
            raise ValueError(f"layer {layer} is one of several, {', '.join(wanted)}; give the whole name")
        routers = {one["router"]: one for one in self.routers if one["layer"] == wanted[0]}
        if router not in routers:
            raise ValueError(f"the audit log has no router {router!r} in {wanted[0]}; it has {', '.join(routers)}")
        return routers[router]


def _rows_with(lists: Any, value: int) -> pa.Array:
    """Numbers of the rows whose list holds a value."""
    parents, values = pc.list_parent_indices(lists), pc.list_flatten(lists)
    return pc.unique(pc.filter(parents, pc.equal(values, value)))


def _token(row: dict[str, Any], expert: int) -> LoggedToken:
    rank = row["experts"].index(expert)
    return LoggedToken(
        row["example"], row["position"], row["slice"], row["weights"][rank], rank, tuple(row["experts"]),
        tuple(row["weights"]), row.get("token_id"), row.get("token_text"),
    )  # fmt: skip
