"""What ``hf-moe env`` says about versions."""

import re
from pathlib import Path

import pytest

from hf_moe_ext.environment import _EXTRAS, TESTED, Device, Environment, PackageVersion, read_environment

ROOT = Path(__file__).parent.parent


def test_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pins[name] for name in TESTED} == TESTED


def test_accepted_ranges_are_those_of_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["recipes"], *extras["test"]]
    packages = {package.name: package for package in read_environment().packages}
    assert packages["python"].accepted == project["requires-python"]
    for name in TESTED:
        assert f"{name}{packages[name].accepted}" in asked
    assert [packages[name].extra for name in ("torch", "datasets", "trl")] == [None, "recipes", "test"]


def test_every_extra_is_known() -> None:
    """One that is not would count as always needed."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(_EXTRAS) - {None}


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ("5.23.0", "tested"),
        ("5.20.1", "in range"),
        ("6.0.0", "out of range"),
        ("5.24.0.dev0", "in range"),
        (None, "missing"),
    ],
)
def test_status_of_a_version(installed: str | None, status: str) -> None:
    assert PackageVersion("transformers", installed, ">=5.17,<6", "5.23.0").status == status


def test_a_local_build_of_the_tested_version_is_the_tested_version() -> None:
    assert PackageVersion("torch", "2.13.0+cu130", ">=2.11", "2.13.0").status == "tested"
    assert PackageVersion("torch", "2.13.0", None, "2.13.0").status == "unknown"


def test_text_says_what_is_missing_and_where_it_comes_from() -> None:
    packages = [
        PackageVersion("trl", None, ">=1.16", "1.16.0", "dev"),
        PackageVersion("peft", "0.22.0", ">=0.21,<0.22", "0.21.2"),
    ]
    devices = [Device("cpu", "2 cores"), Device("cuda:0", "NVIDIA H100", 80 * 2**30)]
    text = Environment("0.1.0", "Linux x86_64", packages, devices).as_text()
    assert "not installed" in text
    assert "optional: pip install 'hf_moe_ext[dev]'" in text
    assert "out of range" in text
    assert "device  cuda:0: NVIDIA H100, 80 GiB" in text
