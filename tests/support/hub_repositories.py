"""What a Hub keeps: repositories as chains of whole commits, and the large objects beside them."""

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit; `sha256` names its content in the object folder."""

    sha256: str
    size: int
    git_oid: str
    is_lfs: bool


@dataclass(frozen=True)
class Commit:
    """One whole state of a repository."""

    oid: str
    message: str
    files: dict[str, StoredFile]
    parent: str | None


@dataclass
class Repository:
    """A model repository; a branch names the commit it is at."""

    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch or a commit id names."""
        return self.commits.get(self.branches.get(revision, revision))

    def list_files(self, revision: str = "main") -> list[str]:
        """Paths at a revision."""
        commit = self.resolve(revision)
        return sorted(commit.files) if commit else []

    def list_history(self, revision: str = "main") -> list[Commit]:
        """Commits of a revision, newest first."""
        commit, history = self.resolve(revision), []
        while commit is not None:
            history.append(commit)
            commit = self.commits.get(commit.parent or "")
        return history

    def add_commit(self, branch: str, message: str, files: dict[str, StoredFile]) -> Commit:
        """Move a branch to a new commit; the only way anything is published."""
        parent = self.branches.get(branch)
        listing = "".join(f"{path} {file.sha256}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{self.id} {parent} {len(self.commits)} {message}\n{listing}".encode()).hexdigest()
        commit = Commit(oid, message, dict(files), parent)
        self.commits[oid] = commit
        self.branches[branch] = oid
        return commit


class Objects:
    """Contents by their sha256, and the parts of unfinished uploads, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Where a content lies."""
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        """Whether the content arrived whole."""
        return self.path(sha256).is_file()

    def put(self, content: bytes) -> StoredFile:
        """Keep the content of a small file."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.path(sha256).write_bytes(content)
        return StoredFile(sha256, len(content), git_oid(content), is_lfs=False)

    def put_part(self, sha256: str, number: int, content: bytes) -> None:
        """Keep one part of an upload."""
        (self.folder / f"{sha256}.part{number}").write_bytes(content)

    def join_parts(self, sha256: str, numbers: list[int]) -> bool:
        """Make the parts the object, if their content has the promised hash."""
        parts = [self.folder / f"{sha256}.part{number}" for number in numbers]
        if not all(part.is_file() for part in parts):
            return False
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != sha256:
            return False
        with self._lock:
            self.path(sha256).write_bytes(content)
        return True

    def as_large_file(self, sha256: str) -> StoredFile:
        """The stored object as a large file of a commit."""
        size = self.path(sha256).stat().st_size
        return StoredFile(sha256, size, git_oid(lfs_pointer(sha256, size)), is_lfs=True)


def git_oid(content: bytes) -> str:
    """Git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git itself stores of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
