"""A newcomer's path, word for word as the README has it: the quickstart, then inspect, pilot, push."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import local_hub
from support.readme import copy_recipes, read_blocks

# Half an hour is what the pilot may take; the quickstart before it pre-trains a base.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_the_path_of_a_newcomer(tmp_path):
    quickstart, after = read_blocks("bash")[:2]
    # `.ci/run` made and filled the environment that this runs in, as the first two commands of the line would.
    *installation, launch = quickstart.strip().split(" && ")
    assert [shlex.split(words)[0] for words in installation] == ["python3", ".venv/bin/pip"]
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    copy_recipes(folder)
    with local_hub(tmp_path) as hub:
        hub.organizations += ("your-name",)
        environment = hub.environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for command in (launch, *after.strip().splitlines()):
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        files = set(hub.repositories["your-name/quickstart"].list_files())
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files
    assert "<html" in (folder / "routing.html").read_text(encoding="utf-8")
    pilot = json.loads((folder / "outputs" / "pilot" / "pilot.json").read_text(encoding="utf-8"))
    assert len(pilot["arms"]) >= 2
    assert pilot["recommendation"]
