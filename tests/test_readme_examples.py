"""The README's examples, run as they are written: against a Hub on loopback that holds tiny models of the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import LocalHub, local_hub
from support.readme import PRELUDE, ROOT, copy_recipes, read_sections

SECTIONS = read_sections()
UNDER_TORCHRUN = "# under torchrun"
# Commands that the suite runs elsewhere, or in small; a command that is not here runs as it is written.
ELSEWHERE = {
    "recipes/mup_transfer.py": "trains for an hour; tests/recipes/test_mup_transfer.py runs it in small",
    "recipes/sparsity_grid.py": "trains for an hour; tests/recipes/test_sparsity_grid.py runs it in small",
    "recipes/upcycle.py": "trains for half an hour; tests/recipes/test_upcycle.py runs it in small",
    "hf-moe transfer": "wants a tuned run; tests/mup/test_transfer.py makes one",
}
# It says which bars a model misses; narrow ones miss some by noise (model_cards/mup-coord.md).
JUDGEMENT = "hf-moe coord-check"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with local_hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.organizations += ("allenai", "meta-llama", "your-name")
        make("publish", tmp_path_factory.mktemp("models"), hub)
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hub):
    """A reader's folder, with what a clone has beside the package; what one section makes, the next may use."""
    folder = tmp_path_factory.mktemp("reader")
    copy_recipes(folder)
    make("prepare", folder, hub)
    return folder


def make(what: str, folder: Path, hub: LocalHub) -> None:
    call = f"from pathlib import Path; from support.readme_models import {what}; {what}(Path({str(folder)!r}))"
    run([sys.executable, "-c", call], ROOT / "tests", hub)


def run(words: list[str], folder: Path, hub: LocalHub) -> str:
    environment = hub.environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    allowed = (0, 1) if words[-1].startswith(JUDGEMENT) else (0,)
    assert done.returncode in allowed, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# In one test: sections build on each other's folders, and a worker of their own each would not share them.
def test_every_example_runs(hub, folder):
    for section in SECTIONS.values():
        together = [block for block in section.python if UNDER_TORCHRUN not in block]
        if together:
            run([sys.executable, "-c", PRELUDE + "\n".join(together)], folder, hub)
        for number, block in enumerate(block for block in section.python if UNDER_TORCHRUN in block):
            script = folder / f"ranks_{number}.py"
            script.write_text(PRELUDE + block, encoding="utf-8")
            run(["torchrun", "--standalone", "--nproc-per-node", "2", str(script)], folder, hub)
        for command in section.commands:
            if not any(words in command for words in ELSEWHERE):
                run(["bash", "-c", command], folder, hub)
