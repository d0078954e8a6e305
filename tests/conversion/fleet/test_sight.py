"""What a fleet sees of the Hub, over HTTP: originals, searches, and what stands where results go."""

import json
from typing import Any

import pytest

from hfquant.conversion.fleet.manifest import Search
from hfquant.conversion.fleet.reconcile import make_plan
from hfquant.conversion.fleet.sight import HubSight, Result
from hfquant.errors import SourceError
from tests.conversion.fleet.recorded import made, manifest
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub


def fill(hub: Hub, repo: str, **files: Any) -> str:
    """A commit of small files of JSON; its hash."""
    store = hub.store
    target = store.repos.get(repo) or store.create(repo)
    blobs = {
        name.replace("_json", ".json"): store.put(json.dumps(text).encode(), False) for name, text in files.items()
    }
    return target.commit("refs/heads/main", "files", "somebody", blobs).sha


@pytest.fixture
def models(hub: Hub) -> dict[str, str]:
    """Repositories and their commits."""
    found = {f"org/{name}": fill(hub, f"org/{name}", config_json={}) for name in ("small", "large", "mine")}
    for repo, parameters, downloads in (("small", 10**9, 5), ("large", 10**11, 50), ("mine", 10**9, 20)):
        hub.store.repos[f"org/{repo}"].parameters = parameters
        hub.store.repos[f"org/{repo}"].downloads = downloads
    return found | {"other/one": fill(hub, "other/one", config_json={})}


def test_originals(hub: Hub, models: dict[str, str]) -> None:
    sight = HubSight()
    seen = sight.original("org/small", "main")
    assert (seen.id, seen.commit, seen.parameters, seen.quantized) == ("org/small", models["org/small"], 10**9, False)
    hub.store.repos["org/mine"].quantization = {"quant_method": "gptq"}
    assert sight.original("org/mine", "main").quantized
    hub.store.repos["org/large"].gated = "manual"
    assert sight.original("org/large", "main").facts["gated"] == "manual"
    with pytest.raises(SourceError, match="not on the Hub, or private"):
        sight.original("org/none", "main")
    hub.store.repos["org/small"].private = True
    with pytest.raises(SourceError, match="not on the Hub, or private"):
        HubSight(TOKENS["bob"]).original("org/small", "main")


def test_a_search_is_by_author_size_and_downloads(models: dict[str, str]) -> None:
    sight = HubSight()
    assert list(sight.found(Search(author="org"), 10)) == ["org/large", "org/mine", "org/small"]
    assert list(sight.found(Search(author="org"), 2)) == ["org/large", "org/mine"]
    assert list(sight.found(Search(author="org", max_params=8e9), 1)) == ["org/mine"], "the limit is of what fits"
    assert list(sight.found(Search(text="one"), 10)) == ["other/one"]


def test_what_stands_where_a_result_goes(hub: Hub) -> None:
    sight, hfquant_json = HubSight(), made("org/small", "1" * 40, "rtn-w8").made
    assert hfquant_json is not None
    assert sight.result("acme/none") == Result(False)
    hub.store.create("acme/empty")
    assert sight.result("acme/empty").empty
    theirs = fill(hub, "acme/theirs", config_json={})
    assert sight.result("acme/theirs") == Result(True, theirs)
    ours = fill(hub, "acme/ours", hfquant_json=hfquant_json)
    seen = sight.result("acme/ours")
    assert (seen.commit, seen.broken, "files" in (seen.made or {})) == (ours, None, False)
    assert (seen.made or {})["base"] == {"id": "org/small", "revision": "1" * 40}
    fill(hub, "acme/ours", hfquant_json={**hfquant_json, "files": [{"path": "gone", "size": 1, "sha256": "0" * 64}]})
    assert sight.result("acme/ours").broken == "gone is missing"
    fill(hub, "acme/later", hfquant_json={**hfquant_json, "schema": 99})
    assert "not of this version" in str(sight.result("acme/later").broken)


def test_a_fleet_of_what_a_search_finds(models: dict[str, str]) -> None:
    fleet = manifest(models=[{"search": {"author": "org", "max_params": 8e9}, "recipes": ["rtn-w8"]}])
    plan = make_plan(fleet, HubSight())
    assert [(v.wanted.target, v.kind) for v in plan.verdicts] == [
        ("acme/mine-rtn-w8", "missing"), ("acme/small-rtn-w8", "missing"),
    ]  # fmt: skip
