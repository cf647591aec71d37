"""Devices and their links: rows of ``hardware.toml`` and of a user's own file of the same form."""

import os
import tempfile
import tomllib
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

BUILT_IN = Path(__file__).with_name("hardware.toml")
_LINKS = ("intra_node_bytes_per_s", "inter_node_bytes_per_s")
_OPTIONAL = {"devices_per_node", "grouped_flops_per_s", "source", *_LINKS}


@dataclass(frozen=True)
class Hardware:
    """What one device can do, by its data sheet or as measured; see ``hardware.toml`` for what each number means.

    Attributes:
        name: of the row.
        flops_per_s: peak of matrix products.
        memory_bytes: of a device.
        memory_bytes_per_s: its bandwidth.
        intra_node_bytes_per_s: to devices of the same node, one way; None: not known.
        inter_node_bytes_per_s: to devices of other nodes, one way; None: not known.
        devices_per_node: how many share a node.
        grouped_flops_per_s: peak of grouped products; None: as of any other.
        source: where the numbers are from.
    """

    name: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    intra_node_bytes_per_s: float | None = None
    inter_node_bytes_per_s: float | None = None
    devices_per_node: int = 8
    grouped_flops_per_s: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "source"):
                if not isinstance(value, str):
                    raise TypeError(f"hardware {self.name!r}: {field.name} must be text, got {value!r}")
                continue
            if value is None and field.name in (*_LINKS, "grouped_flops_per_s"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"hardware {self.name!r}: {field.name} must be a number, got {value!r}")
            if not (isfinite(value) and value > 0):
                raise ValueError(f"hardware {self.name!r}: {field.name} must be above 0, got {value}")
        if self.devices_per_node != int(self.devices_per_node):
            raise ValueError(f"hardware {self.name!r}: devices_per_node must be whole, got {self.devices_per_node}")

    @property
    def grouped_peak(self) -> float:
        """FLOP/s of grouped products."""
        return self.flops_per_s if self.grouped_flops_per_s is None else self.grouped_flops_per_s

    def link(self, between_nodes: bool) -> float:
        """Bytes per second to a device of the same node, or of another.

        Raises:
            ValueError: that was never measured.
        """
        name = _LINKS[between_nodes]
        speed = getattr(self, name)
        if speed is None:
            raise ValueError(
                f"hardware {self.name!r} has no {name}, which this layout needs; measure it with `torchrun ... hf-moe "
                "measure-hardware`, or write it into the file"
            )
        return float(speed)

    @property
    def flops_per_byte(self) -> float:
        """FLOP per byte of memory traffic where products turn compute-bound: tokens per expert, for two-byte weights."""
        return self.flops_per_s / self.memory_bytes_per_s


def list_hardware(extra: Path | None = None) -> dict[str, Hardware]:
    """All known rows; a user's file adds and replaces.

    Raises:
        ValueError: a row with an unknown, missing or impossible number, or a file that is no TOML.
        OSError: no such file.
    """
    rows = _read(BUILT_IN)
    return rows if extra is None else {**rows, **_read(extra)}


def find_hardware(name: str, extra: Path | None = None) -> Hardware:
    """By name, whatever its case.

    Raises:
        ValueError: unknown; tells the known names.
    """
    rows = list_hardware(extra)
    for known, row in rows.items():
        if known.casefold() == name.casefold():
            return row
    raise ValueError(
        f"hardware {name!r} is not known; known: {', '.join(sorted(rows))}. Measure it with `hf-moe measure-hardware`, or "
        "write a row in the form of hardware.toml and pass the file"
    )


def write_hardware(row: Hardware, path: Path) -> None:
    """Add or replace a row of a user's file, whole or not at all.

    Raises:
        ValueError: the file exists and is not one of these.
        OSError: it cannot be written.
    """
    rows = _read(path) if path.exists() else {}
    rows[row.name] = row
    text = "\n".join(format_hardware(one) for one in rows.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", suffix=".toml") as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is for its owner alone
    os.replace(file.name, path)


def _read(path: Path) -> dict[str, Hardware]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not TOML: {error}; see hardware.toml of hf_moe_ext.scaling for the form"
        ) from error
    return {name: _make(name, table, path) for name, table in tables.items()}


def _make(name: str, table: Any, path: Path) -> Hardware:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name} must be a table [{name}] of numbers, got {table!r}")
    known = {field.name for field in fields(Hardware)} - {"name"}
    unknown, missing = sorted(table.keys() - known), sorted(known - _OPTIONAL - table.keys())
    if unknown or missing:
        parts = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(missing)
        raise ValueError(f"{path}: row [{name}] has keys {'; '.join(parts)}; known: {', '.join(sorted(known))}")
    return Hardware(name=name, **table)


def format_hardware(row: Hardware) -> str:
    """A row as it stands in a file."""
    lines = [f"[{_quote(row.name)}]"]
    for key, value in asdict(row).items():
        if key == "name" or value is None:
            continue
        lines.append(f"{key} = {_quote(value) if isinstance(value, str) else repr(value)}")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    escaped = "".join(f"\\u{ord(c):04X}" if ord(c) < 32 or c in '"\\' else c for c in text)
    return f'"{escaped}"'
