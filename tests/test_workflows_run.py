"""The files in workflows/, run: by a shell, before a Hub of their own, with no secret stored anywhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.actions import Names, Workflow, evaluated
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

FOLDER = Path(__file__).parent.parent / "workflows"
RECIPE = {"steps": [{"method": "rtn"}], "grid": "w8g32", "gate": {"max_ppl_ratio": None}}


@pytest.fixture
def workspace(hub: Hub, built: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkout with a fleet of one model and two recipes; a model of the same owner that it does not want."""
    hub.store.upload("alice/model", built("llama"))
    folder = tmp_path / "runner" / "checkout"
    shutil.copytree(FOLDER, folder / "workflows")
    models = [{"id": "alice/model", "recipes": ["a", "b"]}]
    fleet = {"version": 1, "defaults": {"namespace": "alice"}, "recipes": {"a": RECIPE, "b": RECIPE}, "models": models}
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    return folder


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Of a machine on which nobody is logged in."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "XDG_CACHE_HOME") if name in os.environ}
    return kept | {
        "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def trust(hub: Hub) -> dict[str, str]:
    """What GitHub gives to a job that may say who it is."""
    return {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{hub.url}/actions/run", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": hub.oauth.run}


def test_expressions_mean_what_they_mean_there() -> None:
    known = Names(
        secrets={"HF_TOKEN": ""}, inputs={}, matrix={"target": "a/b"}, needs={"plan": {"outputs": {"x": "[]"}}}
    )
    assert evaluated("secrets.HF_TOKEN == '' && matrix.target || ''", known) == "a/b"
    assert evaluated("inputs.only || '*'", known) == "*"
    assert evaluated("needs.plan.outputs.x != '[]'", known) is False
    assert evaluated("fromJSON(needs.plan.outputs.x)", known) == []


@pytest.mark.slow
def test_a_night_of_the_fleet(hub: Hub, workspace: Path, environment: dict[str, str], trust: dict[str, str]) -> None:
    targets = ["alice/model-a", "alice/model-b"]
    for target in targets:
        hub.store.create(target)
    hub.oauth.trusted |= set(targets)
    night = Workflow(FOLDER / "fleet.yml", workspace, environment, trust)
    ran = night.run()
    assert [step.code for step in ran] == [0] * len(ran), [step for step in ran if step.code]
    assert list(dict.fromkeys(step.job for step in ran)) == [
        "plan",
        *(f"convert-{target}" for target in targets),
        "status",
    ]
    for target in targets:
        assert "hfquant.json" in hub.store.repos[target].resolve("main").files
    found = json.loads((workspace / "site" / "fleet.json").read_text())
    assert [pair["verdict"] for pair in found["pairs"]] == ["up to date"] * 2
    assert hub.seen_tokens == {hub.oauth.run, *hub.oauth.issued}, "nobody's own token was there"
    assert set(hub.store.bound.values()) == set(targets)

    heads = {target: hub.store.repos[target].resolve("main").sha for target in targets}
    assert [step.job for step in night.run()] == ["plan", "status"], "the next night there is nothing to do"
    assert {target: hub.store.repos[target].resolve("main").sha for target in targets} == heads


@pytest.mark.slow
def test_a_failed_gate_is_red_and_nothing_is_pushed(
    hub: Hub, workspace: Path, environment: dict[str, str], trust: dict[str, str]
) -> None:
    fleet = yaml.safe_load((workspace / "fleet.yaml").read_text())
    fleet["models"] = [{"id": "alice/model", "recipes": ["a"], "gates": {"max_kl": 1e-9}}]
    (workspace / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    night = Workflow(FOLDER / "fleet.yml", workspace, environment, trust, secrets={"HF_TOKEN": TOKENS["alice"]})
    ran = night.run()
    assert [(step.job, step.command.split()[:3]) for step in ran if step.code] == [
        ("convert-alice/model-a", ["hfquant", "fleet", "status"])
    ]
    assert "alice/model-a" not in hub.store.repos
    assert not hub.oauth.issued, "with a secret, that is used"


@pytest.mark.slow
def test_one_conversion_by_hand(hub: Hub, workspace: Path, environment: dict[str, str], trust: dict[str, str]) -> None:
    inputs = {"model": "alice/model", "recipe": "rtn-w8", "target": "alice/one"}
    by_hand = Workflow(FOLDER / "convert.yml", workspace, environment, trust, inputs=inputs)
    (refused,) = by_hand.run()
    assert refused.code, "it is not trusted, nor is there anything"
    assert "invalid_grant" in refused.out
    hub.store.create("alice/one")
    hub.oauth.trusted.add("alice/one")
    (done,) = by_hand.run()
    assert done.code == 0, done.out
    assert "hfquant.json" in hub.store.repos["alice/one"].resolve("main").files


def job(workspace: Path, environment: dict[str, str], payload: Any = None) -> "subprocess.CompletedProcess[str]":
    """`workflows/job.py` as Hugging Face Jobs begin it."""
    told = {"HF_TOKEN": TOKENS["alice"], "HFQUANT_FOLDER": str(workspace / "service")}
    if payload is not None:
        told["WEBHOOK_PAYLOAD"] = json.dumps(payload)
    command = [sys.executable, "workflows/job.py", "fleet.yaml"]
    return subprocess.run(command, cwd=workspace, env=environment | told, text=True, check=False, capture_output=True)


def told_of(model: str, commit: str, ref: str = "refs/heads/main") -> dict[str, Any]:
    return {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": model},
        "updatedRefs": [{"ref": ref, "newSha": commit}],
    }


def test_a_job_that_a_pull_request_began_does_nothing(hub: Hub, workspace: Path, environment: dict[str, str]) -> None:
    done = job(workspace, environment, told_of("alice/model", "a" * 40, "refs/pr/1"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not (workspace / "service").exists()
    assert not hub.seen_tokens


@pytest.mark.slow
def test_a_job_of_a_schedule_or_a_webhook(hub: Hub, workspace: Path, environment: dict[str, str]) -> None:
    commit = hub.store.repos["alice/model"].resolve("main").sha
    done = job(workspace, environment, told_of("alice/other", commit))
    assert done.returncode == 2, "the fleet is not as it should be"
    assert set(hub.store.repos) == {"alice/model"}, "but of the other model nothing is wanted"
    done = job(workspace, environment)
    assert done.returncode == 0, done.stderr
    assert set(hub.store.repos) == {"alice/model", "alice/model-a", "alice/model-b"}
