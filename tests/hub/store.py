"""What a Hub keeps: users, repositories with their commits, references and pull requests, and the files' bytes."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

DATE = datetime(2026, 1, 1, tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
LARGE = ("*.safetensors", "*.bin", "*.gguf", "tokenizer.json")  # stored as large files whatever their size
LARGE_SIZE = 10_000_000


class Refused(Exception):
    """An answer that is not 200: `status`, and the header X-Error-Code by which the client knows why."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


@dataclass(frozen=True)
class Blob:
    """A file: `sha256` of its bytes, `oid` as git or, if it is large, git of its pointer would name it."""

    sha256: str
    oid: str
    size: int
    large: bool

    @property
    def pointer_size(self) -> int:
        return len(pointer(self.sha256, self.size))


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > LARGE_SIZE or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in LARGE)


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    author: str
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    base: str
    status: str = "draft"
    is_pull_request: bool = True


@dataclass
class Repo:
    """A model repository.  `refs` maps full names (refs/heads/main) to commits; `granted` may read a gated one."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[PullRequest] = field(default_factory=list)
    parameters: int | None = None  # as the Hub counts them in the headers
    downloads: int = 0
    quantization: dict[str, Any] | None = None  # out of config.json
    uploaded: set[str] = field(default_factory=set)  # large files, which are kept for each repository apart

    def resolve(self, revision: str) -> Commit:
        """A branch, tag, pull request, commit or the beginning of one.  Refused if there is none of that name."""
        if revision == "HEAD":
            revision = "main"
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[found[0]]

    def ref(self, revision: str) -> str:
        """The full name of a branch or pull request that can be committed to."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return ref

    def commit(
        self, ref: str, title: str, author: str, changes: Mapping[str, Blob | None], parent: str | None = None
    ) -> Commit:
        """Add a commit to a reference; a change to None removes a file.  Refused (412) if `parent` is not its head."""
        head = self.refs.get(ref)
        if parent is not None and head is not None and not head.startswith(parent):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(self.commits[head].files) if head else {}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        listing = sorted((path, blob.oid) for path, blob in files.items())
        sha = hashlib.sha1(f"{self.id} {head} {title} {len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, head, title, author, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """Newest first."""
        at: Commit | None = self.resolve(revision)
        while at is not None:
            yield at
            at = self.commits[at.parent] if at.parent else None


@dataclass
class Store:
    """Everything of a Hub.  `tokens` maps a token to its user, `orgs` an organization to its members."""

    folder: Path
    tokens: dict[str, str] = field(default_factory=dict)
    read_only: set[str] = field(default_factory=set)  # tokens
    bound: dict[str, str] = field(default_factory=dict)  # tokens to the one repository that they may write to
    orgs: dict[str, set[str]] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)

    def put(self, content: bytes, large: bool) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.folder / sha256
        if not path.is_file():
            path.write_bytes(content)
        size = len(content)
        return Blob(sha256, git_oid(pointer(sha256, size) if large else content), size, large)

    def stored(self, sha256: str) -> Path | None:
        """The bytes of a large file that was uploaded, None if it was not."""
        path = self.folder / sha256
        return path if re.fullmatch(r"[0-9a-f]{64}", sha256) and path.is_file() else None

    def create(self, name: str, *, private: bool = False, gated: str | bool = False) -> Repo:
        made = Repo(name, private=private, gated=gated)
        attributes = self.put(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        made.commit("refs/heads/main", "initial commit", name.partition("/")[0], {".gitattributes": attributes})
        self.repos[name] = made
        return made

    def upload(self, name: str, folder: Path, **settings: Any) -> Repo:
        """A repository with the files of a folder, made behind the client's back."""
        made = self.repos.get(name) or self.create(name, **settings)
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        blobs = {path: self.put(content, is_large(path, len(content))) for path, content in files.items()}
        made.commit("refs/heads/main", "files", name.partition("/")[0], blobs)
        return made

    def may_write(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def check_token(self, token: str | None, name: str) -> None:
        """Refused for one that may not write to this repository, whatever its user may."""
        if token in self.read_only:
            raise Refused(403, message="This token is read only")
        if token in self.bound and self.bound[token] != name:
            raise Refused(403, message=f"This token is for {self.bound[token]}")

    def readable(self, name: str, user: str | None) -> Repo:
        """Refused as the Hub refuses: a private repository looks like one that does not exist."""
        found = self.repos.get(name)
        if found is None or (found.private and not self.may_write(user, name.partition("/")[0])):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def check_gate(self, repo: Repo, user: str | None) -> None:
        """A gated repository may be looked at, its files may not be read."""
        owner = self.may_write(user, repo.id.partition("/")[0])
        if repo.gated and not owner and user not in repo.granted:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to model {repo.id} is restricted.")

    def writable(self, name: str, user: str | None) -> Repo:
        found = self.readable(name, user)
        if not self.may_write(user, name.partition("/")[0]):
            raise Refused(403, message="You don't have the rights to write to this repository")
        return found

    def card(self, commit: Commit) -> dict[str, Any]:
        """The metadata at the head of README.md, empty if there is none that can be read."""
        blob = commit.files.get("README.md")
        text = (self.folder / blob.sha256).read_text("utf-8", "replace") if blob else ""
        found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            data = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            data = None
        return data if isinstance(data, dict) else {}
