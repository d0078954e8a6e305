"""A result that was pushed privately is made public by its owner, and by nobody else."""

import pytest

from hfquant.errors import HubError, JobError, TokenError
from tests.hub.fixtures import TOKENS

from .conftest import Desk


@pytest.fixture
def private(desk: Desk) -> str:
    """A job of alice's that pushed to a private repository."""
    job = desk.submit(private=True)
    desk.work(real=False)
    done = desk.ended(job)
    assert done.pushed is not None
    assert (done.state, done.pushed.private) == ("done", True)
    assert desk.hub.store.repos["alice/small"].private
    return job


def writes(desk: Desk) -> list[str]:
    return [entry for entry in desk.hub.faults.log if not entry.startswith(("GET", "HEAD"))]


def test_made_public_by_its_owner_and_written_down(desk: Desk, private: str) -> None:
    desk.hub.faults.clear()
    done = desk.service.publish(private, "alice", TOKENS["alice"])
    assert writes(desk) == ["PUT /api/models/alice/small/settings"]
    assert not desk.hub.store.repos["alice/small"].private
    assert done.pushed is not None
    assert done.pushed.private is False
    last = desk.service.events(private, "alice")[-1]
    assert (last.kind, last.data["repo"], last.data["user"]) == ("publish", "alice/small", "alice")
    with pytest.raises(JobError, match="no private repository"):
        desk.service.publish(private, "alice", TOKENS["alice"])


def test_nobody_else_can(desk: Desk, private: str) -> None:
    """As with `cancel`: to others there is no such job; with the right job and a wrong token the Hub refuses."""
    desk.hub.faults.clear()
    with pytest.raises(JobError, match="no such job"):
        desk.service.publish(private, "bob", TOKENS["bob"])
    with pytest.raises(TokenError, match="needs a token"):
        desk.service.publish(private, "alice")
    assert desk.hub.faults.log == [], "the Hub was not even asked"
    with pytest.raises(HubError, match="Repository not found"):
        desk.service.publish(private, "alice", TOKENS["bob"])
    desk.hub.store.read_only.add(TOKENS["alice"])
    with pytest.raises(HubError, match="read only") as refused:
        desk.service.publish(private, "alice", TOKENS["alice"])
    assert f"{desk.hub.url}/alice/small/settings" in str(refused.value.hint)
    assert desk.hub.store.repos["alice/small"].private
    assert desk.service.events(private, "alice")[-1].kind != "publish"


def test_what_its_owner_has_not_seen_is_not_made_public(desk: Desk, private: str) -> None:
    repo = desk.hub.store.repos["alice/small"]
    repo.commit("refs/heads/main", "more", "alice", {"more.txt": desk.hub.store.put(b"more", False)})
    with pytest.raises(HubError, match="holds another commit than this job pushed"):
        desk.service.publish(private, "alice", TOKENS["alice"])
    assert repo.private


def test_what_is_gated_stays_gated(desk: Desk) -> None:
    desk.hub.store.repos["alice/model"].gated = "manual"
    job = desk.submit()
    desk.work(real=False)
    assert desk.ended(job).state == "done"
    made = desk.hub.store.repos["alice/small"]
    assert (made.private, made.gated) == (True, "manual")
    desk.service.publish(job, "alice", TOKENS["alice"])
    assert (made.private, made.gated) == (False, "manual")


def test_only_what_was_pushed_privately(desk: Desk) -> None:
    """Neither a job that has not ended, nor a public result, nor a pull request to somebody's private repository."""
    desk.hub.store.create("alice/theirs", private=True)
    waiting = desk.submit(target="alice/later")
    with pytest.raises(JobError, match="no private repository"):
        desk.service.publish(waiting, "alice", TOKENS["alice"])
    desk.work(real=False)
    desk.ended(waiting)
    offered = desk.submit(target="alice/theirs", pull_request=True)
    desk.ended(offered)
    for job in (waiting, offered):
        with pytest.raises(JobError, match="no private repository"):
            desk.service.publish(job, "alice", TOKENS["alice"])
    assert desk.hub.store.repos["alice/theirs"].private
