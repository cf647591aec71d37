"""Pushes by the real client to a Hub on loopback: what arrives, what is refused, and that no half and no token does."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hf_moe_ext.hub import FolderError, HubError, push
from support.hub_server import LocalHub, local_hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub(tmp_path: Path):
    with local_hub(tmp_path) as served:
        yield served
        assert served.tokens_at_storage == 0


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What an adapter's folder holds after a run, as far as a push can tell."""
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    config = {
        "peft_type": "PERFT",
        "variant": "R",
        "r": 4,
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"perft_A": np.arange(9000, dtype=np.float32)}, folder / "adapter_model.safetensors")
    (folder / "metrics.json").write_text(json.dumps({"loss": {"before": 3.0, "after": 2.5, "rows": 9}}))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"pickle")
    return folder


def run(hub: LocalHub, *words: object, token: str | None = "", python: str | None = None, **environment: str):
    """`hf-moe WORDS`, or Python code, in a process of its own; no token may come out of it."""
    command = [sys.executable, *(["-c", python] if python else ["-m", "hf_moe_ext.cli"]), *map(str, words)]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        command, env=hub.environment(token) | paths | environment, capture_output=True, text=True, timeout=300
    )
    for secret in (hub.token, hub.read_token, token):
        assert not secret or secret not in done.stdout + done.stderr
    return done


PUSH_QUICKLY = """
import sys
from hf_moe_ext.hub import HubError, push
try:
    print(push(sys.argv[1], sys.argv[2], wait_seconds=0.01).commit)
except HubError as error:
    sys.exit(str(error))
"""


def files_of(hub: LocalHub, repo_id: str, revision: str = "main") -> list[str]:
    return [path for path in hub.repositories[repo_id].list_files(revision) if path != ".gitattributes"]


def content(hub: LocalHub, repo_id: str, path: str) -> bytes:
    return hub.objects.path(hub.repositories[repo_id].resolve("main").files[path].sha256).read_bytes()


def messages(hub: LocalHub, repo_id: str) -> list[str]:
    return [commit.message for commit in hub.repositories[repo_id].list_history()]


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


# What is refused before anything is sent: no Hub is there at all.


def test_a_dry_run_lists_and_asks_nobody(adapter: Path) -> None:
    report = push(adapter, "me/mine", dry_run=True)
    assert [file["path"] for file in report.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
    ]
    assert "Would push 3 files" in report.as_text()
    assert not (adapter / "README.md").exists()


def test_checkpoints_go_only_when_asked(adapter: Path) -> None:
    report = push(adapter, "me/mine", dry_run=True, include_checkpoints=True)
    assert "checkpoint-2/optimizer.pt" in [file["path"] for file in report.files]
    assert report.left_out == ["training_args.bin"]
    assert push(adapter, "me/mine", dry_run=True, exclude=["metrics*"]).left_out[1] == "metrics.json"


def test_offline_is_told_as_such(adapter: Path) -> None:
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(adapter, "me/mine", token="hf_x")


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut_off(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _no_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"not at all")


def _shard_missing(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def _token_inside(folder: Path) -> None:
    (folder / "notes.txt").write_text("hf_" + "a" * 34)


def _no_model(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_only_pickle, "only pickles .adapter_model.bin, training_args.bin."),
        (_cut_off, "must be .* bytes long"),
        (_no_header, "header cannot be read"),
        (_shard_missing, "model-00001-of-00002.safetensors, which is not there"),
        (_token_inside, "notes.txt holds what looks like a token"),
        (_no_model, "neither adapter_config.json nor config.json"),
    ],
)
def test_a_folder_that_may_not_go(adapter: Path, spoil, words: str) -> None:
    spoil(adapter)
    before = sorted(adapter.rglob("*"))
    with pytest.raises(FolderError, match=words) as caught:
        push(adapter, "me/mine", token="hf_x")
    assert "aaaa" not in str(caught.value)
    assert sorted(adapter.rglob("*")) == before


def test_a_card_that_the_hub_would_refuse_is_refused_here(adapter: Path) -> None:
    (adapter / "README.md").write_text("---\nbase_model: /somewhere/base\n---\nMine.\n")
    with pytest.raises(ValueError, match="no id of the Hub") as caught:
        push(adapter, "me/mine", token="hf_x")
    assert re.search(r"hf-moe card", str(caught.value))


# Round trips: what a reader of the Hub loads is what was trained.

SAVE = """
import sys, torch
from peft import get_peft_model
from hf_moe_ext import OlmoeExtConfig, PerftConfig, push
from support import zoo
from transformers import AutoModelForCausalLM
torch.manual_seed(3)
kind, folder = sys.argv[1], sys.argv[2]
ids = torch.arange(14).reshape(2, 7)
if kind == "ext":
    small = zoo.build("olmoe").config.to_dict() | {"moe_block": "dcca", "moe_latent_size": 16}
    small = {key: value for key, value in small.items() if key not in ("model_type", "architectures", "transformers_version")}
    model = AutoModelForCausalLM.from_config(OlmoeExtConfig(**small))
else:
    zoo.build("olmoe").save_pretrained(folder + "/base")
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = get_peft_model(base, PerftConfig(variant="R", r=4, init_weights=False, task_type="CAUSAL_LM"))
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
"""
LOAD = """
import sys, torch
import hf_moe_ext
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
loader = AutoModelForCausalLM if sys.argv[1] == "ext" else AutoPeftModelForCausalLM
model = loader.from_pretrained(sys.argv[3])
ids = torch.arange(14).reshape(2, 7)
assert torch.equal(model.eval()(input_ids=ids).logits, torch.load(sys.argv[2] + "/logits.pt"))
print(type(model).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("ext", "OlmoeExtForCausalLM"), ("adapter", "PeftModelForCausalLM")])
def test_pushed_and_pulled_gives_equal_logits(hub: LocalHub, tmp_path: Path, kind: str, name: str) -> None:
    saved = run(hub, kind, tmp_path, python=SAVE + "push(model, 'our-team/trained')")
    assert saved.returncode == 0, saved.stderr
    loaded = run(hub, kind, tmp_path, "our-team/trained", python=LOAD)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == name


PUSH_THREE_TIMES = """
push(model, "ours")
with torch.no_grad():
    next(p for p in model.parameters() if p.requires_grad).add_(1)
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
model.push_to_hub("tester/ours", commit_message="again")
model.push_to_hub("tester/theirs")
"""


@pytest.mark.slow
def test_peft_pushes_weights_that_load_under_a_card_of_its_own(hub: LocalHub, tmp_path: Path) -> None:
    """`PeftModel.push_to_hub` saves its own card last, and the one on the Hub wins: after our push it stays ours."""
    saved = run(hub, "adapter", tmp_path, python=SAVE + PUSH_THREE_TIMES)
    assert saved.returncode == 0, saved.stderr
    assert "hf_moe_ext: card" not in content(hub, "tester/theirs", "README.md").decode()
    assert messages(hub, "tester/ours") == ["again", "Weights, card and configuration", "initial commit"]
    assert 'from_pretrained("tester/ours")' in content(hub, "tester/ours", "README.md").decode()
    for repo_id in ("tester/theirs", "tester/ours"):
        loaded = run(hub, "adapter", tmp_path, repo_id, python=LOAD)
        assert loaded.returncode == 0, loaded.stderr


TRAINER = """
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from hf_moe_ext import ModelCardCallback
rows = Dataset.from_list([{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}] * 4)
arguments = TrainingArguments(folder + "/out", max_steps=1, report_to="none", use_cpu=True, hub_model_id="tester/trained", save_strategy="no")
metrics = folder + "/metrics.json"
open(metrics, "w").write('{"loss": {"before": 3.0, "after": 2.5, "rows": 9}}')
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ModelCardCallback(metrics, license="mit")])
trainer.train()
trainer.push_to_hub()
torch.save(model.eval()(input_ids=ids).logits, folder + "/logits.pt")
"""


@pytest.mark.slow
def test_the_trainer_pushes_our_card(hub: LocalHub, tmp_path: Path) -> None:
    saved = run(hub, "adapter", tmp_path, python=SAVE + TRAINER)
    assert saved.returncode == 0, saved.stderr
    card = content(hub, "tester/trained", "README.md").decode()
    assert "| held-out loss, nats per token | 3.0000 | 2.5000 |" in card
    assert "license: mit" in card
    assert "generated automatically" not in card
    assert str(tmp_path) not in card
    loaded = run(hub, "adapter", tmp_path, "tester/trained", python=LOAD)
    assert loaded.returncode == 0, loaded.stderr
