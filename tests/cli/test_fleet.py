"""`hfquant fleet`, on a Hub of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from hfquant.conversion.fleet import verdict
from hfquant.conversion.fleet.manifest import Entry, Manifest, Search, Terms
from tests.hub.server import Hub

Run = Callable[..., Result]
TARGETS = ["alice/model-rtn-w8", "alice/model-rtn-w4g32", "alice/other-rtn-w8"]


@pytest.fixture(autouse=True)
def here(hub: Hub, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """alice's machine, with a fleet of three results of two models."""
    for name in ("model", "other"):
        hub.store.upload(f"alice/{name}", built("llama"))
    models = [{"id": "alice/model", "recipes": ["rtn-w8", "rtn-w4g32"]}, {"id": "alice/other", "recipes": ["rtn-w8"]}]
    fleet = {"version": 1, "defaults": {"namespace": "alice", "gates": {"max_ppl_ratio": 2.0}}, "models": models}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    for name in ("HFQUANT_DATABASE", "HFQUANT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HFQUANT_FOLDER", str(tmp_path / "service"))
    monkeypatch.setenv("HFQUANT_USER", "alice")
    monkeypatch.chdir(tmp_path)


def answer(run: Run, *words: str, code: int = 0) -> Any:
    done = run("fleet", *words)
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout)


def test_what_is_due_in_parts(run: Run) -> None:
    """--only and --max, and nothing twice."""
    plan = run("fleet", "plan")
    assert (plan.exit_code, "3 missing; 3 to do" in plan.stderr) == (2, True)
    assert answer(run, "plan", "--due", "2") == TARGETS[:2]
    assert [p["target"] for p in answer(run, "plan", "--only", "*/other*", "--json", code=2)["pairs"]] == TARGETS[2:]
    first = answer(run, "apply", "--max", "1", "--json")
    assert [(asked["target"], asked["created"]) for asked in first] == [(TARGETS[0], True)]
    assert answer(run, "plan", "--due", "9") == TARGETS[1:]
    assert [asked["target"] for asked in answer(run, "apply", "--only", "alice/other", "--json")] == TARGETS[2:]
    assert [asked["target"] for asked in answer(run, "apply", "--json")] == [TARGETS[1]]
    assert answer(run, "apply", "--json") == []
    assert answer(run, "plan", "--due", "9") == []
    assert len(json.loads(run("jobs", "list", "--json").stdout)) == 3


def test_what_cannot_be_read_is_blocked(run: Run, hub: Hub) -> None:
    del hub.store.repos["alice/other"]
    pairs = answer(run, "plan", "--json", code=2)["pairs"]
    assert [pair["verdict"] for pair in pairs] == ["missing", "missing", "blocked"]
    assert "not on the Hub, or private" in pairs[2]["reasons"][0]


def test_the_exit_code_of_a_status_with_failures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(run, "status", "--check", "--json")["due"] == 3
    known = verdict.Verdict
    judged = lambda wanted, *rest: known(wanted, "failed", ("no memory",))  # noqa: E731
    monkeypatch.setattr("hfquant.conversion.fleet.reconcile.judge", judged)
    assert answer(run, "status", "--check", "--json", code=1)["counts"] == {"failed": 3}
    assert answer(run, "status", "--json")["counts"] == {"failed": 3}


def test_the_schema_knows_every_key_and_no_other(run: Run) -> None:
    schema = answer(run, "schema")
    parts = {"Entry": Entry, "Search": Search, "Terms": Terms}
    for found, model in [(schema, Manifest), *((schema["$defs"][name], model) for name, model in parts.items())]:
        assert found["properties"].keys() == model.model_fields.keys()
        assert found["additionalProperties"] is False
    assert set(schema["required"]) == {"version", "models"}
