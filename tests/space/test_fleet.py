"""A fleet beside the page: what everybody may see of it, asked for once in a while."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hfquant.conversion.fleet.serve import attached
from hfquant.conversion.fleet.webhook import HEADER, PATH
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Settings
from hfquant.errors import HfquantError
from space_app.app import create
from space_app.fleet import OF_THE_SPACE, Fleet
from space_app.login import OAUTH, OWN, Login
from tests.conversion.fleet.recorded import Recorded, made
from tests.hub.server import Hub

SECRET = "0123456789abcdef0123"
HUB = {name: "x" for name in OAUTH} | {"SYSTEM": "spaces"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(Settings(database=f"sqlite:///{tmp_path / 'jobs.sqlite'}", folder=tmp_path)) as found:
        yield found


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    models = [{"id": "org/one", "recipes": ["rtn-w8"]}, {"id": "org/two", "recipes": ["rtn-w8"]}]
    path.write_text(yaml.safe_dump({"version": 1, "defaults": {"namespace": "acme"}, "models": models}))
    return path


def test_shown_as_a_page_and_as_json_and_the_hub_is_asked_once(manifest: Path, service: Service) -> None:
    hub = Recorded({"org/one": "1" * 40, "org/two": "2" * 40}, {"acme/one-rtn-w8": made("org/one", "1" * 40, "rtn-w8")})
    app = FastAPI()
    app.include_router(Fleet(manifest, service, Login({}), hub).routes())
    client = TestClient(app)
    found = client.get("/fleet.json").json()
    assert [pair["verdict"] for pair in found["pairs"]] == ["up to date", "missing"]
    page = client.get("/fleet.html")
    assert "acme/one-rtn-w8" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert sorted(hub.asked) == ["acme/one-rtn-w8", "acme/two-rtn-w8", "org/one", "org/two"], "each once for both"


@pytest.mark.filterwarnings("ignore")
def test_a_webhook_beside_the_page(manifest: Path, service: Service, hub: Hub) -> None:
    kept = Fleet(manifest, service, Login({}), Recorded({}, {}))
    message = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": "org/one"},
        "updatedRefs": [{"ref": "refs/heads/main", "newSha": "1" * 40}],
    }
    with (
        attached(manifest, service, SECRET, kept.user) as hooks,
        TestClient(create(service, Login({}), kept, hooks)) as c,
    ):
        assert "hfquant" in c.get("/").text
        assert c.post(PATH, json=message).status_code == 403
        assert c.post(PATH, json=message, headers={HEADER: SECRET}).json() == {"kept": 1}
        assert c.post(PATH, json=message, headers={HEADER: SECRET}).json() == {"kept": 0}
        assert c.get(PATH).status_code != 202


def test_its_jobs_are_nobodys_who_can_log_in(manifest: Path, service: Service) -> None:
    assert Fleet(manifest, service, Login({})).user == OWN
    assert Fleet(manifest, service, Login(HUB)).user == OF_THE_SPACE
    assert ":" in OF_THE_SPACE, "which no user of the Hub has in their name"


def test_a_manifest_with_a_mistake_is_said_not_shown_as_an_empty_fleet(manifest: Path, service: Service) -> None:
    manifest.write_text("version: 1\nmodles: []\n")
    kept = Fleet(manifest, service, Login({}), Recorded({}, {}))
    with pytest.raises(HfquantError, match="models"):
        kept.plan()
    app = FastAPI()
    app.include_router(kept.routes())
    answer = TestClient(app).get("/fleet.json")
    assert answer.status_code == 503
    assert "models" in answer.json()["detail"]
