"""The calls of `hub_server.py`: one method per call that `huggingface_hub` makes of a Hub."""

import base64
import json
from typing import Any
from urllib.parse import parse_qs

from support.hub_card_rules import check_front_matter
from support.hub_http import Handler, Refusal
from support.hub_repositories import Commit, Repository, StoredFile, lfs_pointer

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".png", ".onnx", ".gguf")
_DATE = "2026-01-01T00:00:00.000Z"


class HubHandler(Handler):
    """The Hub itself."""

    _MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
    calls = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("GET", _MODEL + r"(/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET", _MODEL + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", _MODEL + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", _MODEL + r"/refs", "refs"),
        ("GET", _MODEL + r"/commits/(?P<revision>[^/]+)", "history"),
        ("GET", _MODEL + r"/discussions", "discussions"),
        ("POST DELETE", _MODEL + r"/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", _MODEL + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", _MODEL + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/complete", "lfs_complete"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
        ("GET HEAD", r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    # Who asks, and for what.

    def _token(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in (self.hub.token, self.hub.read_token):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _check_write(self, namespace: str) -> None:
        token = self._token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if token != self.hub.token or namespace not in (self.hub.user, *self.hub.organizations):
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        token = self._token()
        repository = self.hub.repositories.get(repo_id)
        # To those who may not see it, a private repository looks like none.
        if repository is None or (repository.private and token is None):
            raise Refusal(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(repo_id.split("/")[0])
        return repository

    def _commit(self, repository: Repository, revision: str | None) -> Commit:
        commit = repository.resolve(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> tuple[int, Any, dict[str, str]]:
        """Name and rights of the token."""
        token = self._token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if token == self.hub.token else "read"
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.hub.organizations]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return 200, {"type": "user", "id": "1", "name": self.hub.user, "orgs": orgs, "auth": access}, {}

    # Repositories.

    def create(self) -> tuple[int, Any, dict[str, str]]:
        """A repository with an empty first commit."""
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or self.hub.user
        self._check_write(namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.hub.repositories[repo_id] = Repository(repo_id, private)
        attributes = self.hub.objects.put(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.add_commit("main", "initial commit", {".gitattributes": attributes})
        return 200, {"url": url, "name": repo_id, "id": "1"}, {}

    def delete(self) -> tuple[int, Any, dict[str, str]]:
        """Remove a repository."""
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        self._repository(repo_id, write=True)
        del self.hub.repositories[repo_id]
        return 200, {}, {}

    def model_info(self, repo_id: str, revision: str | None = None) -> tuple[int, Any, dict[str, str]]:
        """A repository with its files."""
        repository = self._repository(repo_id)
        commit = self._commit(repository, revision)
        files = [
            {"rfilename": path}
            | ({"size": file.size, "blobId": file.git_oid, **_lfs(file)} if "blobs" in self.query else {})
            for path, file in sorted(commit.files.items())
        ]
        return 200, {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "lastModified": _DATE,
            "createdAt": _DATE,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": files,
        }, {}  # fmt: skip

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> tuple[int, Any, dict[str, str]]:
        """Files below a folder, all of them whether asked to recurse or not."""
        commit = self._commit(self._repository(repo_id), revision)
        inside = f"{folder}/" if folder else ""
        entries = [_entry(path, file) for path, file in sorted(commit.files.items()) if path.startswith(inside)]
        return 200, [e | ({"oid": "0" * 40} if e["path"] in self.hub.spoiled else {}) for e in entries], {}

    def paths_info(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        """Those of the named paths that are files."""
        commit = self._commit(self._repository(repo_id), revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return 200, [_entry(path, commit.files[path]) for path in paths if path in commit.files], {}

    def refs(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        """Branches."""
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self._repository(repo_id).branches.items()
        ]
        return 200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []}, {}

    def history(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        """Commits, newest first."""
        repository = self._repository(repo_id)
        self._commit(repository, revision)
        return 200, [
            {"id": commit.oid, "title": commit.message, "message": "", "date": _DATE, "authors": [{"user": self.hub.user}]}
            for commit in repository.list_history(revision)
        ], {}  # fmt: skip

    def discussions(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        """None."""
        self._repository(repo_id)
        return 200, {"discussions": [], "count": 0, "start": 0}, {}

    def branch(self, repo_id: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        """Make or remove a branch."""
        repository = self._repository(repo_id, write=True)
        if self.command == "DELETE":
            repository.branches.pop(branch, None)
            return 200, {}, {}
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint")
        repository.branches[branch] = self._commit(repository, start).oid
        return 201, {}, {}

    # Uploads.

    def validate_yaml(self) -> tuple[int, Any, dict[str, str]]:
        """Whether a card's front matter is one the Hub takes."""
        errors, warnings = check_front_matter(json.loads(self.body)["content"])
        return (400 if errors else 200), {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }, {}  # fmt: skip

    def preupload(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        """Which files are large."""
        commit = self._commit(self._repository(repo_id, write=True), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] >= self.hub.lfs_bytes
            there = commit.files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there:
                entry["oid"] = there.sha256 if there.is_lfs else there.git_oid
            files.append(entry)
        return 200, {"files": files, "commitOid": commit.oid}, {}

    def lfs_batch(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        """Where to put each large object that is not here yet."""
        self._repository(repo_id, write=True)
        lfs = f"{self.hub.endpoint}/{repo_id}.git/info/lfs"
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if not self.hub.objects.has(oid):
                storage = f"{self.hub.storage_endpoint}/{oid}"
                upload: dict[str, Any] = {"href": f"{storage}/0"}
                if size > self.hub.part_bytes:
                    parts = range(1, -(-size // self.hub.part_bytes) + 1)
                    header = {f"{part:05d}": f"{storage}/{part}" for part in parts}
                    upload = {"href": f"{lfs}/complete", "header": header | {"chunk_size": str(self.hub.part_bytes)}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{lfs}/verify"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_complete(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        """Join the parts of one object. As on the real Hub the address is signed: no token comes with it."""
        wanted = json.loads(self.body)
        if not self.hub.objects.join_parts(wanted["oid"], [part["partNumber"] for part in wanted["parts"]]):
            raise Refusal(400, "the parts do not have the promised hash")
        return 200, {}, {}

    def lfs_verify(self, repo_id: str) -> tuple[int, Any, dict[str, str]]:
        """Whether an object arrived."""
        self._repository(repo_id, write=True)
        wanted = json.loads(self.body)
        if not self.hub.objects.has(wanted["oid"]):
            raise Refusal(404, "object not found")
        return 200, {}, {}

    def commit(self, repo_id: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        """All operations of a commit, or none of them."""
        repository = self._repository(repo_id, write=True)
        head = self._commit(repository, revision)
        header, files = {}, dict(head.files)
        for line in filter(None, self.body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md" and (errors := check_front_matter(content.decode())[0]):
                    raise Refusal(400, errors[0])
                files[value["path"]] = self.hub.objects.put(content)
            elif key == "lfsFile":
                if not self.hub.objects.has(value["oid"]):
                    raise Refusal(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                files[value["path"]] = self.hub.objects.as_large_file(value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {
                    path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
            else:
                raise Refusal(400, f"unknown operation {key}")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        new = repository.add_commit(revision, header["summary"], files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{new.oid}"
        return 200, {"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": ""}, {}

    # Downloads.

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        """A file's content, or the way to it."""
        commit = self._commit(self._repository(repo_id), revision)
        found = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= found
            raise refusal
        if file.is_lfs:
            location = f"{self.hub.storage_endpoint}/{file.sha256}"
            linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Location": location}
            return 302, b"", found | linked | {"ETag": f'"{file.git_oid}"'}
        content = self.hub.objects.path(file.sha256).read_bytes()
        headers = found | {"ETag": f'"{file.git_oid}"', "Content-Length": str(file.size)}
        return 200, content, headers | {"Content-Type": "application/octet-stream"}


def _lfs(file: StoredFile) -> dict[str, Any]:
    if not file.is_lfs:
        return {}
    pointer = len(lfs_pointer(file.sha256, file.size))
    return {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": pointer}}


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": file.git_oid, "size": file.size, **_lfs(file)}
