"""What the Hub says a repository holds, compared with what was to be there."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from .artefact import Artefact, File


@dataclass(frozen=True)
class Remote:
    """The files of a repository at one commit.  private: whether only some may see the repository."""

    revision: str
    commit: str
    files: Mapping[str, RepoFile]
    private: bool | None = None

    @staticmethod
    def read(api: HfApi, repo: str, revision: str) -> "Remote | None":
        """None if there is no such revision."""
        try:
            info = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            return None
        assert info.sha is not None
        listed = api.list_repo_tree(repo, revision=info.sha, recursive=True)
        files = {file.path: file for file in listed if isinstance(file, RepoFile)}
        return Remote(revision, info.sha, files, info.private)

    def has(self, file: File) -> bool:
        """Whether the file is there, as far as the listing tells: size, and sha256 or git's name for it."""
        found = self.files.get(file.path)
        if found is None or found.size != file.size:
            return False
        return found.lfs.sha256 == file.sha256 if found.lfs else found.blob_id == file.git_oid


def check(published: Artefact, remote: Remote, *, api: HfApi | None = None, repo: str = "") -> str | None:
    """What is wrong with a repository, in words; None if every file has its size and sha256.

    The listing has the sha256 of large files.  Of the others it has git's, which decides whether to push; with `api`
    they are fetched and hashed too.
    """
    for file in published.files:
        found = remote.files.get(file.path)
        if found is None:
            return f"{file.path} is missing"
        if found.size != file.size:
            return f"{file.path} has {found.size:,} bytes, not {file.size:,}"
        if not remote.has(file):
            return f"{file.path} has another content"
        if api is not None and not found.lfs and _sha256(api, repo, remote.commit, file.path) != file.sha256:
            return f"{file.path} comes back with another content"
    return None


def _sha256(api: HfApi, repo: str, commit: str, path: str) -> str:
    return hashlib.sha256(read(api, repo, commit, path)).hexdigest()


def read_text(api: HfApi, repo: str, commit: str, path: str) -> str:
    """A small text of a repository."""
    return read(api, repo, commit, path).decode("utf-8")


def read(api: HfApi, repo: str, commit: str, path: str) -> bytes:
    """A small file of a repository."""
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
        return Path(api.hf_hub_download(repo, path, revision=commit, local_dir=folder)).read_bytes()
