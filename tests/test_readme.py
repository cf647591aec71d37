"""The README's commands are the ones that are tested, and what it names exists."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]


def test_the_two_commands_that_install_make_their_own_environment_and_stand_alone():
    first, _, second = commands()[:3]
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
        assert "\n" not in command
    assert first.endswith("recipes/finetune.py")
    assert second.endswith(".venv/bin/pytest")


def test_ci_runs_the_test_command_word_for_word():
    assert commands()[2] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:recipes|model_cards)/[\w/]+\.(?:py|yaml|md|json)", README)))
)
def test_every_named_file_exists(path):
    assert (ROOT / path).is_file(), path


def test_every_python_block_compiles():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        if not requirement.startswith(("hf_moe_ext", "types-")):
            assert "# " in line, f"{requirement}: say in pyproject.toml why it is needed"


def test_nothing_names_a_machine():
    """No absolute path of somebody's machine in what is committed."""
    folders = ("hf_moe_ext", "recipes", "tests", "model_cards", ".ci")
    suffixes = {".py", ".md", ".yaml", ".json", ".toml", ""}
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in suffixes]
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|farm|Users)/\w")
    found = [str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts and pattern.search(p.read_text())]
    assert not found
