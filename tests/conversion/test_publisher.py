"""Pushing as a trusted publisher: with a token that is for one repository, and swapped for that of a workflow's run."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import _auth

from hfquant.conversion.hub import push
from hfquant.errors import HubError
from tests.hub.fixtures import TOKENS, log_in
from tests.hub.server import Hub


@pytest.fixture
def run(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A run of a workflow that alice/small trusts."""
    log_in(monkeypatch, hub, None)
    monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
    for name, value in {
        "HF_OIDC_RESOURCE": "alice/small",
        "GITHUB_ACTIONS": "true",
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{hub.url}/actions/run",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": hub.oauth.run,
    }.items():
        monkeypatch.setenv(name, value)
    hub.store.create("alice/small")
    hub.oauth.trusted.add("alice/small")
    return monkeypatch


def test_to_its_repository_and_to_no_other(run: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    assert push(folder, "alice/small").changed
    assert not push(folder, "alice/small").changed
    assert len(hub.oauth.issued) == 1, "a token is good for an hour"
    hub.store.create("alice/other")
    with pytest.raises(HubError, match="This token is for alice/small"):
        push(folder, "alice/other")
    with pytest.raises(HubError, match="a trusted publisher may not create it") as error:
        push(folder, "alice/none")
    assert "name this workflow" in str(error.value.hint)


def test_who_is_not_trusted_gets_nothing(run: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    hub.oauth.trusted.clear()
    with pytest.raises(HubError, match="invalid_grant"):
        push(folder, "alice/small")
    run.delenv("ACTIONS_ID_TOKEN_REQUEST_URL")
    with pytest.raises(HubError) as error:
        push(folder, "alice/small")
    assert "id-token: write" in str(error.value.hint)
    assert "hfquant.json" not in hub.store.repos["alice/small"].resolve("main").files


def test_a_pull_request_of_a_stranger_is_not_its_own(run: pytest.MonkeyPatch, hub: Hub, folder: Path) -> None:
    """bob opened one under the very title: what else he put there nobody would have looked at."""
    first = push(folder, "alice/small", pr=True)
    bobs = HfApi(token=TOKENS["bob"])
    title = hub.store.repos["alice/small"].discussions[0].title
    number = bobs.create_pull_request("alice/small", title).num
    again = push(folder, "alice/small", pr=True)
    assert len({first.pull_request, number, again.pull_request}) == 3
