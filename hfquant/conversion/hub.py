"""Pushing a compressed model to the Hub: one commit, read back.

A push may be cut anywhere and given again.  Each step first looks at what is there: a repository that exists is not
created, a pull request that waits is used, a large file that arrived is not sent, a commit that happened is found.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..errors import HubError
from ..model.remote import Token
from ..model.source import WEIGHTS
from . import artefact
from .access import EMPTY, MAIN, Target, check_access, read_json
from .artefact import Artefact
from .provenance import FILE as PROVENANCE
from .retry import patiently
from .verify import Remote, check


@dataclass(frozen=True)
class Pushed:
    """Where a checkpoint is now.  `pull_request` is its number; `changed` is False if all was there already."""

    repo: str
    revision: str
    commit: str
    url: str
    pull_request: int | None
    files: int
    bytes: int
    changed: bool


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    pr: bool = False,
    revision: str | None = None,
    force: bool = False,
    token: Token = None,
    guard: Callable[[], None] | None = None,
) -> Pushed:
    """Publish the checkpoint in `folder` as one commit, then compare every file's size and sha256 with the Hub's.

    private: of a repository that does not exist yet; by default only if the original is private or gated.
    pr: as a pull request.  revision: a branch, made if it is not there, or `refs/pr/N`.
    force: also where something else is, and although quality was not measured or not reached.
    guard: asked between files, and last before the commit; what it raises stops the push, and nothing is published.

    Raises what `artefact.read` and `check_access` raise, and HubError for a push that did not arrive whole.
    """
    published = artefact.read(Path(folder), force=force)
    target = check_access(repo, private=private, pr=pr, revision=revision, force=force, token=token)
    api, where, number = HfApi(token=token), revision or MAIN, None
    if not target.exists:
        patiently(lambda: _create(api, target, published, private))
    head = patiently(lambda: Remote.read(api, target.repo, MAIN if pr else where))
    if head is not None and check(published, head) is None:
        return _pushed(target, published, head, where, None, changed=False)
    base = head or patiently(lambda: Remote.read(api, target.repo, MAIN))
    if base is not None and base.files.keys() <= EMPTY:
        patiently(lambda: _gate(api, target, published))
    if pr:
        number = patiently(lambda: _pull_request(api, target, published))
        where, head = f"refs/pr/{number}", None
    elif where != MAIN and not where.startswith("refs/"):
        patiently(lambda: api.create_branch(target.repo, branch=where, exist_ok=True))
    work = _Commit(api, target, published, where, head, guard)
    done = patiently(work)
    if problem := patiently(lambda: check(published, done, api=api, repo=target.repo)):
        raise HubError(f"{target.repo} is not what was pushed: {problem}", "run the same command again")
    return _pushed(target, published, done, where, number, changed=work.sent)


class _Commit:
    """One commit, made at most once however often it is tried.

    before: what was there when the push began.  If the head moves meanwhile, either this commit arrived and only the
    answer was lost, or somebody else's did, which must not be overwritten.
    """

    def __init__(
        self,
        api: HfApi,
        target: Target,
        published: Artefact,
        revision: str,
        before: Remote | None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.api, self.target, self.published, self.revision = api, target, published, revision
        self.before, self.sent, self.guard = before, False, guard

    def __call__(self) -> Remote:
        head = Remote.read(self.api, self.target.repo, self.revision)
        if head is None:
            raise HubError(f"{self.target.repo} has no revision {self.revision}", "give a branch that exists")
        if check(self.published, head) is None:
            return head
        self.before = self.before or head
        if head.commit != self.before.commit:
            raise HubError(f"{self.target.repo} was changed while pushing", "look at it, then run the command again")
        old = _files_of(self.api, self.target.repo, head)
        gone = [CommitOperationDelete(path) for path in _stale(self.published, head, old)]
        new = [_addition(file) for file in self.published.files if not head.has(file)]
        if self.guard is not None:
            for addition in new:
                self.guard()
                self.api.preupload_lfs_files(self.target.repo, [addition], revision=self.revision, free_memory=False)
            self.guard()
        self.sent = True
        try:
            made = self.api.create_commit(
                self.target.repo,
                [*gone, *new],
                commit_message=f"{self.published.name}, compressed with hfquant",
                commit_description=f"Key {self.published.provenance['key']}",
                revision=self.revision,
                parent_commit=head.commit,
            )
        except json.JSONDecodeError:
            raise  # an error page instead of an answer
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412:
                raise
            return self()  # the head moved: by this commit, or by somebody else's
        except ValueError as error:
            raise HubError(f"the Hub does not accept the card: {error}", "correct README.md") from error
        found = Remote.read(self.api, self.target.repo, made.oid)
        if found is None:
            raise HubError(f"{self.target.repo} does not know the commit it made", "run the same command again")
        return found


def _create(api: HfApi, target: Target, published: Artefact, private: bool | None) -> None:
    """A new repository: private if the original is private or gated, unless the user decided."""
    source = published.report.get("source") or {}
    if private is None and (source.get("private") or source.get("gated")):
        private = True
    api.create_repo(target.repo, private=private, exist_ok=True)


def _gate(api: HfApi, target: Target, published: Artefact) -> None:
    """What was made from a gated model is gated, before there is anything to read."""
    gated = (published.report.get("source") or {}).get("gated")
    if gated in ("auto", "manual"):
        api.update_repo_settings(target.repo, gated=gated)


def _pull_request(api: HfApi, target: Target, published: Artefact) -> int:
    """The number of the open pull request of an earlier attempt, or of a new one.

    One that a stranger opened under this title may hold anything: where nobody can tell whose it is, it is not used.
    """
    title = f"{published.name}, compressed with hfquant ({published.provenance['key'][:12]})"
    waiting = api.get_repo_discussions(
        target.repo, author=target.user, discussion_type="pull_request", discussion_status="open"
    )
    for found in waiting if target.user else ():
        if found.title == title:
            return found.num
    return api.create_pull_request(target.repo, title, description="Made and verified by hfquant; see its card.").num


def _files_of(api: HfApi, repo: str, head: Remote) -> set[str]:
    """The files of the push before this one."""
    listed = read_json(api, repo, head, PROVENANCE).get("files")
    return {str(file.get("path")) for file in listed} if isinstance(listed, list) else set()


def _stale(published: Artefact, head: Remote, old: set[str]) -> list[str]:
    """What an earlier push left and this one lacks, and weights of any origin: two models in one repository mix."""
    gone = head.files.keys() - {file.path for file in published.files} - EMPTY
    return sorted(path for path in gone if path in old or path.endswith(WEIGHTS))


def _addition(file: artefact.File) -> CommitOperationAdd:
    made = CommitOperationAdd(file.path, file.content)
    made.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: it need not be read again for it
    return made


def _pushed(
    target: Target, published: Artefact, head: Remote, revision: str, number: int | None, changed: bool
) -> Pushed:
    return Pushed(
        repo=target.repo,
        revision=revision,
        commit=head.commit,
        url=f"{HfApi().endpoint}/{target.repo}" + (f"/discussions/{number}" if number else ""),
        pull_request=number,
        files=len(published.files),
        bytes=published.bytes,
        changed=changed,
    )
