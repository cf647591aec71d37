"""One push: the repository made, everything sent in one commit, the result read back."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.hf_api import RepoFile

from hf_moe_ext.cards import CARD, check_front_matter, find_metrics, name_repository, write_card
from hf_moe_ext.hub.errors import HubError, explain, find_cause, may_pass
from hf_moe_ext.hub.folder import UploadFile, list_upload

logger = logging.getLogger(__name__)

MESSAGE = "Weights, card and configuration"
_UPLOADED = "large files are uploaded, in no commit yet"
_LONGEST_WAIT_SECONDS = 60.0
_T = TypeVar("_T")


@dataclass
class PushReport:
    """What was pushed, or with `dry_run` would be."""

    repo_id: str
    files: list[dict[str, Any]]
    left_out: list[str]
    dry_run: bool
    revision: str = "main"
    commit: str | None = None
    url: str | None = None
    card_written: bool = False
    done: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The same to read."""
        total = sum(file["bytes"] for file in self.files)
        verb = "Would push" if self.dry_run else "Pushed and read back"
        lines = [f"{verb} {len(self.files)} files, {total / 1e6:.1f} MB, to {self.repo_id} ({self.revision}):"]
        lines += [f"  {file['path']}  {file['bytes']:,} bytes" for file in self.files]
        if self.card_written:
            lines.append("The card was rendered: the folder had none.")
        if self.left_out:
            lines.append(f"Left here: {', '.join(self.left_out)}")
        return "\n".join([*lines, *([self.url] if self.url else [])])


def push(
    source: Any,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    include_checkpoints: bool = False,
    exclude: Sequence[str] = (),
    license: str | None = None,
    dry_run: bool = False,
    attempts: int = 5,
    wait_seconds: float = 1.0,
) -> PushReport:
    """Push a folder, or a model that is saved to one first, in one commit, and read it back.

    Args:
        source: The folder that `save_pretrained` wrote, or what has `save_pretrained`: a model, a PEFT model.
        repo_id: `name` or `organisation/name`; made where it is not there.
        private: Make it private. A public repository that is already there is refused, and not made private.
        revision: The branch; made where it is not there. None for `main`.
        message: Of the commit.
        token: None for the one of `hf auth login` or HF_TOKEN.
        endpoint: Of another Hub; None for HF_ENDPOINT.
        include_checkpoints: Push `checkpoint-*` too, with optimizer states.
        exclude: Patterns of top folders and files that stay.
        license: For the card, when it is rendered here.
        dry_run: Check and list; ask the Hub nothing.
        attempts: How often a call that may succeed later is made.
        wait_seconds: Before the second attempt; doubled each time, up to a minute.

    Returns:
        What was pushed.

    Raises:
        FolderError: The folder may not be pushed as it is; nothing was sent.
        CardError: The folder has no card and none can be rendered.
        HubError: The Hub refused, or could not be reached.
    """
    options: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "message": message,
        "token": token,
        "endpoint": endpoint,
    }
    options |= {"attempts": attempts, "wait_seconds": wait_seconds, "dry_run": dry_run, "license": license}
    if hasattr(source, "save_pretrained"):
        with tempfile.TemporaryDirectory() as saved:
            source.save_pretrained(saved)
            return push(saved, repo_id, **options)
    folder = Path(source)
    files, left_out = list_upload(folder, include_checkpoints, exclude)
    without_card = not (folder / CARD).is_file()
    if without_card and not dry_run:
        write_card(folder, find_metrics(folder), license=license, name=repo_id)
        files, left_out = list_upload(folder, include_checkpoints, exclude)
    elif not without_card:
        check_front_matter(folder)
    listed = [{"path": file.path, "bytes": file.size} for file in files]
    report = PushReport(
        repo_id, listed, left_out, dry_run, revision or "main", card_written=without_card and not dry_run
    )
    if not dry_run:
        _Push(report, private, token, endpoint, attempts, wait_seconds).publish(files, message or MESSAGE)
    return report


def check_login(token: str | None = None) -> str:
    """The token that a push would use; it is not tried.

    Raises:
        HubError: There is none.
    """
    found = token or get_token()
    if not found:
        raise HubError("A push needs a token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    return found


class _Push:
    """A push under way: the repository, and in the report what was done to it so far."""

    def __init__(
        self,
        report: PushReport,
        private: bool,
        token: str | None,
        endpoint: str | None,
        attempts: int,
        wait_seconds: float,
    ) -> None:
        self.report, self.private, self.token, self.endpoint = report, private, check_login(token), endpoint
        self.repo_id, self.branch, self.done = report.repo_id, report.revision, report.done
        self.attempts, self.wait_seconds = max(1, attempts), wait_seconds
        self.api = HfApi(endpoint=endpoint, token=self.token)

    def publish(self, files: Sequence[UploadFile], message: str) -> None:
        """Make the repository, send everything in one commit, read it back; the report is filled in."""
        self._make_repository()
        files = [self._as_published(file) if file.path == CARD else file for file in files]
        operations = [CommitOperationAdd(file.path, file.content or str(file.place)) for file in files]
        # Large files first and by themselves: these calls try again by themselves, the commit does not.
        self._call("upload", lambda: self.api.preupload_lfs_files(self.repo_id, operations, revision=self.branch))
        if any(operation._upload_mode == "lfs" for operation in operations):
            self.done.append(_UPLOADED)
        commit, url = self._commit(operations, files, message)
        self.done[:] = [entry for entry in self.done if entry != _UPLOADED] + [f"commit {commit}"]
        if wrong := self._call("read back", lambda: self._differences(files, commit)):
            raise HubError(self._told(f"The Hub gives other content than was sent for {', '.join(wrong)}. Push again."))
        self.report.repo_id, self.report.commit, self.report.url = self.repo_id, commit, url

    def _as_published(self, card: UploadFile) -> UploadFile:
        """The card with the repository's name where it says how to load."""
        text = card.place.read_text(encoding="utf-8")
        content = name_repository(text, self.repo_id, None if self.branch == "main" else self.branch).encode()
        return replace(card, content=content, size=len(content))

    def _make_repository(self) -> None:
        made = self._call(
            "create", lambda: self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
        )
        self.repo_id = made.repo_id
        self.done.append(f"the repository {self.repo_id} is there")
        if self.private and not self._call("ask", lambda: self.api.model_info(self.repo_id)).private:
            raise HubError(
                self._told(
                    f"{self.repo_id} is there already and public, and --private does not change that. Make it private in "
                    "its settings, or push to another name."
                )
            )
        if self.branch != "main":
            self._call("branch", lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
            self.done.append(f"its branch {self.branch} is there")

    def _commit(
        self, operations: list[CommitOperationAdd], files: Sequence[UploadFile], message: str
    ) -> tuple[str, str]:
        tried = False

        def commit() -> tuple[str, str]:
            nonlocal tried
            if tried and not self._differences(files, self.branch):  # it was made, and its answer was lost
                head = self.api.model_info(self.repo_id, revision=self.branch).sha
                return str(head), f"{self.api.endpoint}/{self.repo_id}/commit/{head}"
            tried = True
            info = self.api.create_commit(self.repo_id, operations, commit_message=message, revision=self.branch)
            return info.oid, info.commit_url

        return self._call("commit", commit)

    def _differences(self, files: Sequence[UploadFile], revision: str) -> list[str]:
        """Files that the Hub does not hold as they are here."""
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return [file.path for file in files if not _is_same(file, there.get(file.path))]

    def _call(self, what: str, call: Callable[[], _T]) -> _T:
        """Make a call of the Hub; again, where that can help."""
        wait = self.wait_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except Exception as error:
                # Uploads and listings were already tried again by huggingface_hub.
                again = may_pass(error) and what not in ("upload", "read back")
                if not again or attempt == self.attempts:
                    logger.debug("%s failed", what, exc_info=True)
                    # Without the cause: its request carries the token, and the message says what it said.
                    raise HubError(self._told(explain(error, what, self.repo_id, self.api.endpoint))) from None
                cause = type(find_cause(error)).__name__
                logger.warning("%s: %s; attempt %d of %d follows in %.1f s", what, cause, attempt + 1, self.attempts, wait)  # fmt: skip
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        raise AssertionError("unreachable")

    def _told(self, message: str) -> str:
        """The message with what was done so far; whatever the Hub quotes, the token is not in it."""
        done = "; ".join(self.done) or "nothing"
        commit = "" if any(entry.startswith("commit ") for entry in self.done) else " Nothing was committed."
        return f"{message} Done so far: {done}.{commit}".replace(str(self.token), "***")


def _is_same(file: UploadFile, entry: RepoFile | None) -> bool:
    if entry is None or entry.size != file.size:
        return False
    return entry.lfs.sha256 == file.sha256() if entry.lfs else entry.blob_id == file.git_oid()
