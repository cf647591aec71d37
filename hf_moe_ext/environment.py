"""The versions and devices at hand, against those the package accepts and was tested with: ``hf-moe env``."""

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import hf_moe_ext

# constraints.txt does not ship in the wheel; a test holds the two together.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "evaluate": "0.4.6",
    "trl": "1.16.0",
    "safetensors": "0.8.0",
}


# Of a package that several bring, the first is named.
_EXTRAS = (None, "recipes", "audit", "plan", "pilot", "search", "test", "programs", "dev")


@dataclass(frozen=True)
class PackageVersion:
    """One package.

    Attributes:
        name: as it is installed.
        installed: its version; None if it is missing.
        accepted: the range pyproject.toml asks for; None if the package's metadata is not at hand.
        tested: the version the suite was run with; None for Python, of which only the range matters.
        extra: the extra that brings it; None for what is always needed.
    """

    name: str
    installed: str | None
    accepted: str | None
    tested: str | None
    extra: str | None = None

    @property
    def status(self) -> str:
        """One of "missing", "out of range", "tested", "in range" (accepted, another version was tested), "unknown"."""
        if self.installed is None:
            return "missing"
        if self.accepted is None:
            return "unknown"
        version = Version(self.installed)
        if not SpecifierSet(self.accepted).contains(version, prereleases=True):
            return "out of range"
        return "tested" if self.tested and version.public == Version(self.tested).public else "in range"


@dataclass(frozen=True)
class Device:
    """A device torch can compute on; memory in bytes, None where it does not say."""

    kind: str
    name: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Environment:
    """All that a bug report needs to say about a machine, and nothing that identifies it."""

    hf_moe_ext: str
    platform: str
    packages: list[PackageVersion]
    devices: list[Device]

    def as_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        packages = [asdict(package) | {"status": package.status} for package in self.packages]
        return asdict(self) | {"packages": packages}

    def as_text(self) -> str:
        """Plain text to paste into an issue."""
        rows = [("package", "installed", "accepted", "tested", "")]
        rows += [
            (p.name, p.installed or "not installed", p.accepted or "unknown", p.tested or "", _remark(p))
            for p in self.packages
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        devices = [f"device  {d.kind}: {d.name}{_format_memory(d.memory_bytes)}" for d in self.devices]
        return "\n".join([f"hf_moe_ext {self.hf_moe_ext} on {self.platform}", "", *lines, "", *devices])


def read_environment() -> Environment:
    """Look at the installed packages (without importing them) and at torch's devices."""
    requirements, python = _read_requirements()
    packages = [PackageVersion("python", ".".join(map(str, sys.version_info[:3])), python, None)]
    for name, tested in TESTED.items():
        accepted, extra = requirements.get(name, (None, None))
        packages.append(PackageVersion(name, _installed_version(name), accepted, tested, extra))
    return Environment(hf_moe_ext.__version__, f"{platform.system()} {platform.machine()}", packages, _read_devices())


def _read_requirements() -> tuple[dict[str, tuple[str, str | None]], str | None]:
    """Name -> (accepted versions, extra) and the accepted Pythons, as the installed metadata says."""
    try:
        description = metadata.metadata("hf_moe_ext")
    except metadata.PackageNotFoundError:  # a checkout on sys.path
        return {}, None
    found: dict[str, tuple[str, str | None]] = {}
    for line in description.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        extra = next((e for e in _EXTRAS if marker is None or marker.evaluate({"extra": e or ""})), None)
        if requirement.name not in found or _EXTRAS.index(extra) < _EXTRAS.index(found[requirement.name][1]):
            # In reverse, ">=" stands before "<".
            accepted = ",".join(sorted((str(part) for part in requirement.specifier), reverse=True))
            found[requirement.name] = (accepted, extra)
    return found, description["Requires-Python"]


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read_devices() -> list[Device]:
    devices = [Device("cpu", f"{os.cpu_count()} cores")]
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what people run this for
        return [*devices, Device("unknown", f"torch cannot be imported: {error}")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [*devices, Device("accelerator", "none that torch can use")]
    for index in range(torch.accelerator.device_count()):
        if accelerator.type in ("cuda", "xpu"):
            properties = getattr(torch, accelerator.type).get_device_properties(index)
            devices.append(Device(f"{accelerator.type}:{index}", properties.name, properties.total_memory))
        else:
            devices.append(Device(f"{accelerator.type}:{index}", "no further details"))
    return devices


def _remark(package: PackageVersion) -> str:
    if package.status == "missing" and package.extra:
        return f"optional: pip install 'hf_moe_ext[{package.extra}]'"
    if package.status == "in range":
        return "accepted" if package.tested is None else "accepted, but not the version that was tested"
    return "" if package.status == "tested" else package.status


def _format_memory(size: int | None) -> str:
    return "" if size is None else f", {size / 2**30:.0f} GiB"
