"""The output folder: whose it is, where to go on from, and pushing it to the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import logging

from finetune_arguments import FinetuneTrainingArguments, UserError
from hf_moe_ext import push
from hf_moe_ext.hub import HubError, check_login

logger = logging.get_logger("finetune")

RUN_FILE = "run.json"
_CACHES = ("quickstart-base-", "pretrain-tokenizer-", ".building-")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


class Run(Protocol):
    """What a recipe's arguments say about the folder of its run."""

    @property
    def training(self) -> FinetuneTrainingArguments: ...

    @property
    def push_to_hub(self) -> bool: ...

    @property
    def output_dir(self) -> Path: ...

    def describe(self) -> dict[str, Any]:
        """What makes a run this run and no other."""


def check_output_folder(arguments: Run) -> None:
    """Refuse a folder that holds another run; writes nothing.

    Raises:
        UserError: The folder is taken, or the run to resume is another one.
    """
    folder, resume = arguments.output_dir, wants_resume(arguments)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file. Name a folder.")
    held = list_run_files(folder)
    if not held or arguments.training.overwrite_output_dir:
        return
    if not resume:
        raise UserError(
            f"--output_dir {folder} already holds another run ({held[0].name}, {len(held)} entries). Name a new folder, "
            "go on with --resume_from_checkpoint true, or delete it with --overwrite_output_dir."
        )
    settings = _read_run(folder)
    for name, value in json.loads(json.dumps(arguments.describe())).items():
        if settings.get(name) != value:
            raise UserError(
                f"--resume_from_checkpoint: {folder} holds another run: its {name} is {settings.get(name)!r}, not "
                f"{value!r}. Give the settings of that run, or a new --output_dir."
            )


def claim_output_folder(arguments: Run) -> None:
    """Write down whose run this is; with `--overwrite_output_dir`, delete the earlier run first."""
    folder = arguments.output_dir
    if arguments.training.overwrite_output_dir and not wants_resume(arguments):
        for path in list_run_files(folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(arguments.describe(), indent=1) + "\n", encoding="utf-8")


def wants_resume(arguments: Run) -> bool:
    """Whether `--resume_from_checkpoint` asks for anything."""
    value = arguments.training.resume_from_checkpoint
    return value is not None and str(value).lower() not in _FALSE


def find_checkpoint(arguments: Run) -> str | None:
    """The checkpoint to go on from; None to start at step 0.

    Raises:
        UserError: The path given holds no checkpoint.
    """
    if not wants_resume(arguments):
        return None
    value = str(arguments.training.resume_from_checkpoint)
    if value.lower() not in _TRUE:
        if not (Path(value) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {value} is no complete checkpoint: it has no trainer_state.json. "
                "Give a checkpoint-N folder, or 'true' for the latest of --output_dir."
            )
        return value
    # A run killed while it saved leaves a folder without the file that is written last.
    found = sorted(
        arguments.output_dir.glob("checkpoint-*/trainer_state.json"),
        key=lambda path: int(path.parent.name.split("-")[1]),
    )
    if not found:
        logger.warning(
            "--resume_from_checkpoint: %s holds no checkpoint yet; starting at step 0.", arguments.output_dir
        )
        return None
    return str(found[-1].parent)


def list_run_files(folder: Path) -> list[Path]:
    """What a folder holds apart from a cached base."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(_CACHES))


def check_hub_login(arguments: Run) -> None:
    """Refuse `--push_to_hub` without a token before anything is trained.

    Raises:
        UserError: There is no token.
    """
    if not arguments.push_to_hub:
        return
    try:
        check_login(arguments.training.hub_token)
    except HubError as error:
        raise UserError(f"--push_to_hub true: {error} Or give --hub_token.") from error


def push_folder(arguments: Run) -> str:
    """Push the finished folder in one commit; checkpoints and pickled files stay here.

    Returns:
        Address of the commit.

    Raises:
        UserError: The Hub refused, or could not be reached; the folder is as it was.
    """
    training, folder = arguments.training, arguments.output_dir
    try:
        report = push(
            folder,
            training.hub_model_id or folder.resolve().name,
            private=bool(training.hub_private_repo),
            revision=training.hub_revision,
            message="Weights, card and metrics of a recipe",
            token=training.hub_token,
            exclude=[f"{name}*" for name in _CACHES],
        )
    except (HubError, ValueError) as error:
        raise UserError(
            f"--push_to_hub true: {error} The run itself is complete in {folder}: hf-moe push sends it."
        ) from error
    return str(report.url)


def _read_run(folder: Path) -> dict[str, object]:
    try:
        settings = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"--resume_from_checkpoint: {folder} is not empty and holds no readable {RUN_FILE}, so it is no run of "
            "this script. Give the --output_dir of the run to go on with."
        )
    return settings
