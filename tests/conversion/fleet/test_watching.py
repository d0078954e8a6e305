"""Asking the Hub to tell of new commits, and opening nothing without a secret."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
import yaml
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.conversion.database import Database, arrivals
from hfquant.conversion.fleet.webhook import HEADER, PATH
from tests.hub.server import Hub
from tests.serving import serving

SECRET = "0123456789abcdef0123"
MODELS = [
    {"id": "org/one", "recipes": ["rtn-w8"]},
    {"id": "org/one", "recipes": ["rtn-w4g64"]},
    {"search": {"author": "lab"}, "recipes": ["rtn-w8"]},
]


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "defaults": {"namespace": "acme"}, "models": MODELS}))
    monkeypatch.setenv("HFQUANT_FOLDER", str(tmp_path))
    monkeypatch.setenv("HFQUANT_WEBHOOK_SECRET", SECRET)
    return str(path)


@pytest.mark.parametrize("where", [("--job", "j1"), ("--url", "https://me.example/webhooks/hub")])
def test_a_webhook_watches_what_the_fleet_follows(
    where: tuple[str, str], manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def create(self: HfApi, **given: Any) -> Any:
        asked.update(given)
        return SimpleNamespace(id="w1")

    monkeypatch.setattr(HfApi, "create_webhook", create)
    done = CliRunner().invoke(app, ["webhooks", "create", "--manifest", manifest, *where, "--json"])
    assert done.exit_code == 0, done.output
    assert asked["watched"] == [{"type": "model", "name": "org/one"}, {"type": "user", "name": "lab"}]
    assert (asked["secret"], asked["domains"]) == (SECRET, ["repo"])
    assert (asked["job_id"], asked["url"]) == ((where[1], None) if where[0] == "--job" else (None, where[1]))
    assert SECRET not in done.output
    assert json.loads(done.stdout)["watched"] == ["org/one", "lab"]


@pytest.mark.parametrize("command", [("serve",), ("create", "--job", "j1")])
@pytest.mark.parametrize("secret", [None, "short"])
def test_without_a_secret_nothing_is_opened(
    command: tuple[str, ...], secret: str | None, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HFQUANT_WEBHOOK_SECRET")
    if secret is not None:
        monkeypatch.setenv("HFQUANT_WEBHOOK_SECRET", secret)
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: pytest.fail("it opened"))
    done = CliRunner().invoke(app, ["webhooks", *command, "--manifest", manifest])
    assert done.exit_code == 2
    assert "secret" in done.output


def test_a_burst_on_a_server(manifest: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hfquant webhooks serve`, over HTTP: everybody is answered, every commit is kept, each once."""
    answers: list[int] = []

    def burst(url: str, part: int) -> None:
        with httpx2.Client(headers={HEADER: SECRET}, timeout=60) as client:
            for i in range(part, 200, 8):
                told = {
                    "event": {"action": "update", "scope": "repo.content"},
                    "repo": {"type": "model", "name": "org/one"},
                    "updatedRefs": [{"ref": "refs/heads/main", "newSha": f"{i // 2:040x}"}],
                }
                answers.append(client.post(url, json=told).status_code)

    def run(app: Any, **given: Any) -> None:
        assert given["host"] == "127.0.0.1", "nobody else's, unless it is said"
        with serving(app) as url, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: burst(url + PATH, part), range(8)))
            assert httpx2.post(url + PATH, json={}, headers={HEADER: SECRET[:-1]}).status_code == 403

    monkeypatch.setattr("uvicorn.run", run)
    done = CliRunner().invoke(app, ["webhooks", "serve", "--manifest", manifest], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert answers == [202] * 200
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with database.read() as connection:
        kept = connection.execute(sa.select(arrivals.c.commit)).scalars().all()
    database.close()
    assert sorted(kept) == [f"{i:040x}" for i in range(100)]


def test_either_a_job_or_a_server(manifest: str) -> None:
    for words in ((), ("--job", "j", "--url", "https://x")):
        done = CliRunner().invoke(app, ["webhooks", "create", "--manifest", manifest, *words])
        assert (done.exit_code, "either" in done.output) == (2, True)
