"""Pushes by the real client to a Hub on loopback: what arrives, what is refused, and that no half and no token does."""

import json
import math
from pathlib import Path

import pytest

from support.hub_client import PUSH_QUICKLY, content, files_of, messages, run
from support.hub_server import LocalHub


def test_a_push_is_one_commit_without_pickles_and_with_a_card(hub: LocalHub, adapter: Path) -> None:
    done = run(hub, "push", adapter, "mine", "--message", "first words", "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["repo_id"] == "tester/mine"
    assert report["left_out"] == ["checkpoint-2", "training_args.bin"]
    assert report["card_written"]
    assert files_of(hub, "tester/mine") == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
    ]
    assert messages(hub, "tester/mine") == ["first words", "initial commit"]
    card = content(hub, "tester/mine", "README.md").decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("tester/mine")' in card
    assert "license: mit" in card
    assert "base_model: org/base" in card
    weights = "adapter_model.safetensors"
    assert content(hub, "tester/mine", weights) == (adapter / weights).read_bytes()
    assert hub.repositories["tester/mine"].resolve("main").files[weights].is_lfs


def test_a_private_repository_and_a_branch(hub: LocalHub, adapter: Path) -> None:
    done = run(hub, "push", adapter, "our-team/mine", "--private", "--revision", "try/one")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["our-team/mine"]
    assert repository.private
    assert "adapter_model.safetensors" in repository.list_files("try/one")
    assert repository.list_files("main") == [".gitattributes"]
    card = hub.objects.path(repository.resolve("try/one").files["README.md"].sha256).read_text()
    assert 'from_pretrained("our-team/mine", revision="try/one")' in card
    fetch = (
        "from huggingface_hub import hf_hub_download as d; print(d('our-team/mine', 'README.md', revision='try/one'))"
    )
    assert run(hub, python=fetch).returncode == 0
    nobody = run(hub, python=fetch, token=None, HF_HOME=str(adapter / "other-home"))
    assert nobody.returncode != 0
    assert "RepositoryNotFoundError" in nobody.stderr


def test_private_over_a_public_repository_is_refused(hub: LocalHub, adapter: Path) -> None:
    assert run(hub, "push", adapter, "mine").returncode == 0
    (adapter / "more.json").write_text("{}")
    done = run(hub, "push", adapter, "mine", "--private")
    assert done.returncode == 2
    assert "is there already and public" in done.stderr
    assert "more.json" not in files_of(hub, "tester/mine")


@pytest.mark.parametrize(
    ("fail", "token", "words"),
    [
        (None, "hf_wrongTokenWrongTokenWrongToken00", ["401", "hf auth login", "Done so far: nothing"]),
        (None, None, ["needs a token", "hf auth login"]),
        (None, "read", ["403", "right to write"]),
        ({"status": 404, "path": "/preupload/"}, "", ["404", "Check the name", "the repository tester/mine is there"]),
        ({"status": 409, "path": "/commit/"}, "", ["409", "Run the same command again", "large files are uploaded"]),
        ({"status": 412, "path": "/commit/"}, "", ["412", "committed meanwhile", "Nothing was committed"]),
        ({"status": 413, "path": "/objects/batch"}, "", ["413", "smaller shards", "Nothing was committed"]),
    ],
)
def test_a_refusal_says_what_to_do(hub: LocalHub, adapter: Path, fail, token, words: list[str]) -> None:
    if fail:
        hub.fail(**fail)
    before = sorted(path.name for path in adapter.iterdir())
    done = run(hub, "push", adapter, "mine", token=hub.read_token if token == "read" else token, HF_DEBUG="1")
    assert done.returncode == 2, done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("hf-moe push: "))
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in message
    assert all(repository.list_files() == [".gitattributes"] for repository in hub.repositories.values())
    assert sorted(path.name for path in adapter.iterdir()) == sorted([*before, "README.md"])


def test_a_dropped_upload_goes_on(hub: LocalHub, adapter: Path) -> None:
    hub.part_bytes = 10_000
    hub.drop(method="PUT", path="/2")
    hub.fail(503, path="/create")
    hub.fail(429, path="/preupload/", headers={"Retry-After": "0"})
    hub.drop(path="/commit/", method="POST")
    done = run(hub, adapter, "mine", python=PUSH_QUICKLY)
    assert done.returncode == 0, done.stderr
    weights = "adapter_model.safetensors"
    parts = [path for method, path in hub.requests if method == "PUT"]
    assert len(parts) == len(set(parts)) + 1 == -(-(adapter / weights).stat().st_size // hub.part_bytes) + 1
    assert content(hub, "tester/mine", weights) == (adapter / weights).read_bytes()
    assert len(messages(hub, "tester/mine")) == 2


def test_an_answer_that_is_lost_makes_no_second_commit(hub: LocalHub, adapter: Path) -> None:
    hub.drop(path="/commit/", method="POST", after=True)
    done = run(hub, adapter, "mine", python=PUSH_QUICKLY)
    assert done.returncode == 0, done.stderr
    assert len(messages(hub, "tester/mine")) == 2
    assert done.stdout.strip() == hub.repositories["tester/mine"].branches["main"]


def test_a_hub_that_keeps_failing_publishes_nothing_and_sends_nothing_twice(hub: LocalHub, adapter: Path) -> None:
    hub.fail(500, times=math.inf, path="/commit/")
    done = run(hub, adapter, "mine", python=PUSH_QUICKLY)
    assert done.returncode == 1
    assert "500" in done.stderr
    assert "large files are uploaded, in no commit yet. Nothing was committed." in done.stderr
    assert sum(path.startswith("/api/models/tester/mine/commit/") for _, path in hub.requests) == 5
    assert messages(hub, "tester/mine") == ["initial commit"]
    hub.heal()
    assert run(hub, adapter, "mine", python=PUSH_QUICKLY).returncode == 0
    assert len([path for method, path in hub.requests if method == "PUT"]) == 1


def test_content_that_comes_back_changed_is_told(hub: LocalHub, adapter: Path) -> None:
    hub.spoiled.add("adapter_config.json")
    done = run(hub, adapter, "mine", python=PUSH_QUICKLY)
    assert done.returncode == 1
    assert "gives other content than was sent for adapter_config.json. Push again" in done.stderr


def test_the_token_is_in_no_log_and_no_file(hub: LocalHub, adapter: Path) -> None:
    loud = "import logging; logging.basicConfig(level=logging.DEBUG)\n" + PUSH_QUICKLY
    hub.fail(500, times=math.inf, path="/commit/")
    done = run(hub, adapter, "mine", python=loud, HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    assert "DEBUG" in done.stderr  # `run` has searched it
    kept = [path for path in adapter.parent.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if hub.token.encode() in path.read_bytes()]
