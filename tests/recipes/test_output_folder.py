"""Whose folder it is, and where to go on from."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune import refuse_mistakes
from finetune_arguments import Arguments, UserError, parse_arguments
from output_folder import check_hub_login, check_output_folder, claim_output_folder, find_checkpoint
from support.hub_server import local_hub


def _arguments(folder: Path, *flags: str) -> Arguments:
    return parse_arguments(["--output_dir", str(folder), *flags])


def _make_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_a_new_folder_and_one_with_a_cached_base_are_free(tmp_path: Path) -> None:
    check_output_folder(_arguments(tmp_path / "new"))
    (tmp_path / "quickstart-base-0123").mkdir()
    check_output_folder(_arguments(tmp_path))
    assert not (tmp_path / "new").exists()


def test_another_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    claim_output_folder(_arguments(tmp_path))
    with pytest.raises(UserError) as raised:
        check_output_folder(_arguments(tmp_path))
    assert all(
        word in str(raised.value) for word in (str(tmp_path), "--resume_from_checkpoint", "--overwrite_output_dir")
    )
    check_output_folder(_arguments(tmp_path, "--resume_from_checkpoint", "true"))
    with pytest.raises(UserError, match=r"its variant is 'R', not 'S'"):
        check_output_folder(_arguments(tmp_path, "--resume_from_checkpoint", "true", "--variant", "S"))


def test_a_folder_of_something_else_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"run\.json"):
        check_output_folder(_arguments(tmp_path, "--resume_from_checkpoint", "true"))
    with pytest.raises(UserError, match="is a file"):
        check_output_folder(_arguments(tmp_path / "thesis.tex"))


def test_overwriting_deletes_the_run_and_keeps_the_base(tmp_path: Path) -> None:
    _make_checkpoint(tmp_path, 5)
    (tmp_path / "quickstart-base-0123").mkdir()
    arguments = _arguments(tmp_path, "--overwrite_output_dir")
    check_output_folder(arguments)
    claim_output_folder(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart-base-0123", "run.json"]


def test_the_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    resume = _arguments(tmp_path, "--resume_from_checkpoint", "true")
    assert find_checkpoint(_arguments(tmp_path)) is None
    assert find_checkpoint(resume) is None
    for step, complete in ((9, True), (10, True), (11, False)):
        _make_checkpoint(tmp_path, step, complete)
    assert find_checkpoint(resume) == str(tmp_path / "checkpoint-10")
    given = _arguments(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-9"))
    assert find_checkpoint(given) == str(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match=r"checkpoint-11.*trainer_state\.json"):
        find_checkpoint(_arguments(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-11")))


def test_pushing_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_ext.hub.pushing.get_token", lambda: None)
    with pytest.raises(UserError, match="--push_to_hub true: A push needs a token"):
        check_hub_login(_arguments(tmp_path, "--push_to_hub", "true"))
    check_hub_login(_arguments(tmp_path, "--push_to_hub", "true", "--hub_token", "hf_x"))


def test_full_fine_tuning_cannot_be_resumed(tmp_path: Path) -> None:
    claim_output_folder(_arguments(tmp_path, "--peft", "full"))
    _make_checkpoint(tmp_path, 4)
    with pytest.raises(UserError, match="--resume_from_checkpoint with --peft full"):
        refuse_mistakes(_arguments(tmp_path, "--peft", "full", "--resume_from_checkpoint", "true"))


@pytest.mark.slow
def test_a_run_pushes_itself_and_writes_its_token_nowhere(
    olmoe_dir: Path, json_file: Path, tmp_path: Path, recipes: Path
) -> None:
    settings = {
        "model_name_or_path": olmoe_dir, "dataset_name": json_file, "output_dir": tmp_path / "run", "max_steps": 2,
        "save_steps": 1, "per_device_train_batch_size": 2, "max_new_tokens": 3, "use_cpu": True, "push_to_hub": True,
        "hub_private_repo": True, "hub_model_id": "our-team/run",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    with local_hub(tmp_path) as hub:
        command = [sys.executable, str(recipes / "finetune.py"), *words, "--hub_token", hub.token]
        environment = hub.environment(token=None) | {"PYTHONPATH": str(recipes.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["our-team/run"]
        listed = repository.list_files()
        assert repository.private
        assert len(repository.commits) == 2
        assert {"README.md", "metrics.json", "adapter_model.safetensors", "run.json"} <= set(listed)
        assert not [path for path in listed if path.startswith("checkpoint") or path.endswith(".bin")]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "training_args.bin"]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    assert hub.token not in done.stdout + done.stderr
    assert "--hub_token HF_TOKEN" in (tmp_path / "run" / "README.md").read_text()
