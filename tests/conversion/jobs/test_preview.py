"""What is said beforehand, from headers: sizes that come true, and everything that would be refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfquant.compress import compress
from hfquant.conversion.licences import problem
from hfquant.conversion.planner import Planner
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits
from hfquant.errors import SourceError
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

from .conftest import Desk
from .forks import start
from .test_hostile import change, hundred_thousand_layers, remote_code

FAMILIES = ("llama", "gpt2", "t5", "mixtral")


@pytest.mark.parametrize(
    "recipe",
    ["rtn-w4g32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rtn-w3g32", "sparsegpt-2of4-w4g32"))],
)
def test_the_size_comes_true(desk: Desk, model: Path, tmp_path: Path, recipe: str) -> None:
    """What is announced is what a compression writes, but for the files' headers."""
    changes = ["calibration.samples=2", "calibration.seq_len=16"] if "sparse" in recipe else []
    found = desk.service.preview(desk.request(recipe=recipe, changes=changes), user="alice", token=TOKENS["alice"])
    assert found.problems == ()
    assert found.allowed
    from hfquant.recipe import Recipe

    for _ in compress(model, Recipe.parse(recipe, changes), tmp_path / "out"):
        pass
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.bytes_after is not None
    assert 0 <= written - found.bytes_after < 20_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    method = {"compressed_tensors": "compressed-tensors", "gptq": "gptq", "native": "hfquant"}
    assert config["quant_method"] == method[str(found.format)]
    assert found.bytes_before == sum(f.stat().st_size for f in model.glob("*.safetensors"))
    assert {runtime.name for runtime in found.runtimes} == {"hfquant", "transformers", "vLLM"}
    assert next(r for r in found.runtimes if r.name == "vLLM").loads is (found.format != "native")


def test_what_is_known_of_a_model(desk: Desk) -> None:
    found = desk.service.preview(desk.request(), token=TOKENS["alice"])
    facts = found.model
    assert facts is not None
    assert (facts.model_type, facts.architecture, facts.license) == ("llama", "LlamaForCausalLM", "apache-2.0")
    assert facts.parameters == sum(facts.dtypes.values())
    assert facts == desk.service.inspect("alice/model", token=TOKENS["alice"])
    assert (found.exists, found.private, found.target, found.usd) == (False, False, "alice/small", 0.0)
    assert found.bits_per_weight is not None
    assert 4 < found.bits_per_weight < 5
    assert all(value is not None and value > 0 for value in (found.memory, found.disk))
    assert found.seconds is not None
    assert 10 < found.seconds[0] < found.seconds[1], "two processes are begun, whatever they do"
    assert [e for e in desk.hub.faults.log if not e.startswith(("GET", "HEAD"))] == [], "nothing was changed"
    assert desk.hub.faults.asked("GET", "/stored/") == desk.hub.faults.asked("GET", "/stored/")[:3], "headers only"


def kinds(found: Any) -> dict[str, bool]:
    return {problem.kind: problem.blocks for problem in found.problems}


def test_problems_are_told_not_raised(desk: Desk, model: Path) -> None:
    """All that is wrong, at once, each in words; bad requests too."""
    preview = desk.service.preview
    assert kinds(preview({})) == {"target": True}
    assert kinds(preview({"model": "x", "recipe": "rtn-w4"})) == {"target": True}
    several = preview({"model": "alice/none", "recipe": "rtm-w4", "target": "bob/x"}, token=TOKENS["alice"])
    assert kinds(several) == {"recipe": True, "missing": True, "target": True}
    assert not several.allowed
    assert all(problem.message and problem.hint for problem in several.problems)
    assert kinds(preview(desk.request(recipe="rtn-w4g32", changes=["keep=['*']"]))) == {"recipe": True}
    assert kinds(preview(desk.request(recipe="gptq-w4g32"))) == {"recipe": True}, "sequences longer than the model's"
    assert preview(desk.request(recipe="gptq-w4g32", changes=["calibration.seq_len=256"])).allowed
    desk.hub.store.upload("alice/private", model, private=True)
    assert kinds(preview(desk.request() | {"model": "alice/private"})) == {"missing": True}
    desk.hub.store.upload("alice/gated", model, gated="manual")
    assert kinds(preview(desk.request() | {"model": "alice/gated"}, token=TOKENS["bob"])) == {
        "gated": True, "target": True,
    }  # fmt: skip
    mine = preview(desk.request(private=False) | {"model": "alice/gated"}, token=TOKENS["alice"])
    assert (kinds(mine), mine.private) == ({"license": False}, False)
    assert preview(desk.request() | {"model": "alice/gated"}, token=TOKENS["alice"]).private is True
    for n in range(4):
        desk.submit(target=f"alice/r{n}")
    assert kinds(preview(desk.request(target="alice/new"), user="alice")) == {"limit": True}


@pytest.mark.parametrize(("spoil", "kind"), [(remote_code, "code"), (hundred_thousand_layers, "missing")])
def test_hostile_models_cost_nothing(desk: Desk, model: Path, spoil: Callable[[Path], None], kind: str) -> None:
    spoil(model)
    desk.hub.store.upload("alice/model", model)
    found = desk.service.preview(desk.request())
    assert kinds(found)[kind]
    assert not (model.parent / "ran").exists()


def test_a_config_that_takes_too_long(hub: Hub, desk: Desk, model: Path) -> None:
    """The child is killed, the next question is answered by another one."""
    planner = Planner(start, patience=3.0)
    desk.service._preview._planner = planner
    change(model / "config.json", num_hidden_layers=2_000, layer_types=None)
    names = {f"model.layers.{n}.self_attn.q_proj.weight": ("F32", (8, 8)) for n in range(2_000)}
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(SourceError, match="could not be found out"):
        planner.ask(("slow",), "alice/slow", config, names, {"steps": [{"method": "rtn"}], "grid": "w4g32"})
    planner._patience = 60.0
    assert desk.service.preview(desk.request()).bytes_after
    planner.close()


def test_it_does_not_fit(desk: Desk) -> None:
    limits = Limits(memory=1_000_000, disk=1_000)
    with Service(replace(desk.settings, limits=limits), begin=start) as service:
        found = service.preview(desk.request())
    assert kinds(found) == {"memory": True, "disk": True}


@pytest.fixture
def planner() -> Iterator[Planner]:
    made = Planner(start)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_families(
    family: str, hub: Hub, built: Callable[[str], Path], planner: Planner, tmp_path: Path
) -> None:
    from hfquant.conversion.survey import Survey

    hub.store.upload("alice/model", built(family))
    _, config, tensors = Survey().see("alice/model", "main", None)
    recipe = {"steps": [{"method": "rtn"}], "grid": "w4g32"}
    laid = planner.ask((family,), "alice/model", config, tensors, recipe)
    list(compress(built(family), recipe, tmp_path / "out"))
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= written - laid["bytes_after"] < 40_000


LICENCES = [
    ("apache-2.0", None, None), ("mit", None, None), ("cc-by-4.0", None, None), ("gpl-3.0", None, None),
    ("cc-by-nc-4.0", "no commercial use", True), ("cc-by-nd-4.0", "forbids changed copies", True),
    ("cc-by-nc-nd-4.0", "forbids changed copies", True), ("llama3.1", "terms of its own", False),
    ("gemma", "terms of its own", False), ("other", "terms of its own", False), (None, "names no licence", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "blocks"), LICENCES)
def test_licences(name: str | None, words: str | None, blocks: bool | None) -> None:
    found = problem({"license": name}, accepted=False)
    assert (found is None) == (words is None)
    if found is not None and words is not None:
        assert words in found.message
        assert found.blocks is blocks
        accepted = problem({"license": name}, accepted=True)
        assert accepted is not None
        assert not accepted.blocks
    named = problem({"license": "other", "license_name": "some-non-commercial-license"}, accepted=False)
    assert named is not None
    assert named.blocks


def test_a_commit_is_read_once_by_whoever_may_read_it(desk: Desk) -> None:
    """Its page each time: a new commit, or a closed gate, shows at once to those who have not read it yet."""
    asked = lambda: [entry for entry in desk.hub.faults.log if "/resolve/" in entry]  # noqa: E731
    first = desk.service.preview(desk.request(), token=TOKENS["alice"])
    assert len(asked()) == 2, "config and header"
    assert desk.service.preview(desk.request(recipe="rtn-w8"), token=TOKENS["alice"]).model == first.model
    assert len(asked()) == 2
    desk.hub.store.repos["alice/model"].gated = "manual"
    refused = desk.service.preview(desk.request(target=None), token=TOKENS["bob"])
    assert [problem.kind for problem in refused.problems if problem.blocks] == ["gated"]
    config = desk.hub.store.put(b"{}", False)
    desk.hub.store.repos["alice/model"].commit("refs/heads/main", "x", "alice", {"config.json": config})
    assert not desk.service.preview(desk.request(), token=TOKENS["alice"]).allowed


def test_who_comes_first_does_not_wait_for_a_process_to_begin(desk: Desk) -> None:
    desk.service.warm()
    child = desk.service._planner._child
    assert child is not None
    assert child.exited() is None
    assert desk.service.preview(desk.request(), token=TOKENS["alice"]).bytes_after
    assert desk.service._planner._child is child
