"""Pushing to a Hub: what arrives, what is refused, and what happens when the connection goes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from transformers import AutoTokenizer

from hfquant import load
from hfquant.compress import compress
from hfquant.conversion import hub as pushing
from hfquant.conversion import retry
from hfquant.conversion.access import check_access
from hfquant.errors import CheckpointError, HubError, QualityError
from hfquant.measure import card
from hfquant.measure.verify import verify
from hfquant.model.calibration import token_batches
from hfquant.recipe import Recipe
from tests.hub.faults import Kind
from tests.hub.fixtures import TOKENS, log_in
from tests.hub.server import Hub
from tests.measure.test_card import HOSTILE

TOKENS_IN = torch.arange(4, 36)[None]


def arrived(hub: Hub, repo: str, revision: str = "main") -> dict[str, str]:
    files = hub.store.repos[repo].resolve(revision).files
    return {path: blob.sha256 for path, blob in files.items() if path != ".gitattributes"}


def commits(hub: Hub, repo: str, revision: str = "main") -> int:
    """Without the one that every repository begins with."""
    return len(list(hub.store.repos[repo].history(revision))) - 1


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS_IN).logits


@pytest.mark.parametrize("xet", [False, True])
def test_pushed_deleted_and_loaded_again(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, xet: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.xet.enabled = xet
    before = logits(load(folder))
    done = pushing.push(folder, "alice/small")
    shutil.rmtree(folder)
    assert torch.equal(logits(load("alice/small")), before)
    assert commits(hub, "alice/small") == 1
    assert done.commit == hub.store.repos["alice/small"].resolve("main").sha
    assert (done.files, done.changed) == (len(arrived(hub, "alice/small")), True)
    assert (done.url, done.revision) == (f"{hub.url}/alice/small", "main")


def test_through_a_pull_request(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.create("alice/small")
    log_in(monkeypatch, hub, "bob")
    before = logits(load(folder))
    done = pushing.push(folder, "alice/small", pr=True)
    assert done.pull_request == 1
    assert commits(hub, "alice/small") == 0
    assert torch.equal(logits(load("alice/small", revision="refs/pr/1")), before)
    again = pushing.push(folder, "alice/small", pr=True)
    assert (again.pull_request, again.changed, len(hub.store.repos["alice/small"].discussions)) == (1, False, 1)
    log_in(monkeypatch, hub, "alice")
    HfApi().merge_pull_request("alice/small", 1)
    assert torch.equal(logits(load("alice/small")), before)
    merged = pushing.push(folder, "alice/small", pr=True)
    assert (merged.pull_request, merged.changed) == (None, False)


def test_provenance_names_every_file(hub: Hub, folder: Path) -> None:
    pushing.push(folder, "alice/small")
    files = arrived(hub, "alice/small")
    origin = json.loads((hub.store.folder / files["hfquant.json"]).read_text())
    assert {file["path"]: file["sha256"] for file in origin["files"]} == {
        path: sha256 for path, sha256 in files.items() if path != "hfquant.json"
    }
    report = json.loads((folder / "report.json").read_text())
    assert origin["recipe"]["name"] == "rtn-w4g32"
    assert origin["metrics"]["perplexity"] == report["evaluation"]["perplexity"]
    assert origin["versions"]["torch"] == torch.__version__
    assert origin["hardware"]["processor"]
    assert origin["recipe"]["hash"] == Recipe.parse("rtn-w4g32").hash
    assert origin["calibration"] is None
    assert len(origin["key"]) == 64


def test_provenance_names_what_it_was_calibrated_with(hub: Hub, built: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("The lion walked down the yellow road. " * 200)
    sizes = ["calibration.samples=4", "calibration.seq_len=32", f"calibration.source={tmp_path / 'mine.txt'}"]
    for _ in compress(built("llama"), Recipe.parse("gptq-w4g32", sizes), tmp_path / "small"):
        pass
    verify(tmp_path / "small", windows=2, window_len=32, new_tokens=2, enforce=False)
    pushing.push(tmp_path / "small", "alice/small")
    found = arrived(hub, "alice/small")
    calibration = json.loads((hub.store.folder / found["hfquant.json"]).read_text())["calibration"]
    tokenizer = AutoTokenizer.from_pretrained(built("llama"))
    tokens = token_batches(str(tmp_path / "mine.txt"), tokenizer, samples=4, seq_len=32, seed=calibration["seed"])
    assert calibration["sha256"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert (calibration["source"], calibration["samples"], calibration["seq_len"]) == ("mine.txt", 4, 32)


def test_paths_of_this_machine_stay_here(hub: Hub, folder: Path) -> None:
    source = json.loads((folder / "report.json").read_text())["source"]["id"]
    assert source.startswith("/")
    pushing.push(folder, "alice/small")
    for sha256 in arrived(hub, "alice/small").values():
        content = (hub.store.folder / sha256).read_bytes()
        assert str(Path(source).parent).encode() not in content
        assert TOKENS["alice"].encode() not in content


def test_pushing_again_changes_nothing(hub: Hub, folder: Path) -> None:
    first = pushing.push(folder, "alice/small")
    hub.faults.clear()
    again = pushing.push(folder, "alice/small")
    assert (again.commit, again.changed) == (first.commit, False)
    assert not [entry for entry in hub.faults.log if not entry.startswith(("GET", "HEAD"))]


def test_a_new_result_replaces_the_old_one(hub: Hub, folder: Path, made: Callable[..., Path]) -> None:
    pushing.push(folder, "alice/small")
    repo = hub.store.repos["alice/small"]
    extra = {"picture.png": hub.store.put(b"png", False), "model-00001-of-00002.safetensors": hub.store.put(b"", True)}
    repo.commit("refs/heads/main", "extra", "alice", extra)
    pushing.push(made("rtn-w8"), "alice/small")
    files = arrived(hub, "alice/small")
    assert files["model.safetensors"] == hashlib.sha256((made("rtn-w8") / "model.safetensors").read_bytes()).hexdigest()
    assert "picture.png" in files, "not ours, and in nobody's way"
    assert "model-00001-of-00002.safetensors" not in files, "two models in one repository"


def test_branches(hub: Hub, folder: Path) -> None:
    pushing.push(folder, "alice/small", revision="w4")
    assert (commits(hub, "alice/small"), commits(hub, "alice/small", "w4")) == (0, 1)
    assert "hfquant.json" in arrived(hub, "alice/small", "w4")
    with pytest.raises(HubError, match="main branch"):
        pushing.push(folder, "alice/small", revision="w4", pr=True)


def requests_of_a_push(hub: Hub, folder: Path, **settings: Any) -> int:
    pushing.push(folder, "alice/measured", **settings)
    files = [entry for entry in hub.faults.log if "/resolve/" in entry]
    count = len(hub.faults.log) - len(files) + 2
    hub.faults.clear()
    return count


@pytest.mark.parametrize("pr", [False, True])
def test_cut_anywhere_and_given_again(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, pr: bool) -> None:
    """The connection goes at a request of a push, and stays away; then the same push is given again.

    Every request in turn, of those that only read a file back the first two.
    """
    monkeypatch.setattr(retry, "TRIES", 2)
    monkeypatch.setattr(_http, "_http_backoff_base", partial(_http._http_backoff_base, max_retries=0))
    if pr:
        hub.store.create("alice/measured")
    points = requests_of_a_push(hub, folder, pr=pr)
    assert points >= 15
    for point in range(points):
        name = f"alice/cut-{point}"
        if pr:
            hub.store.create(name)
        hub.faults.add("down", at=point)
        with pytest.raises(HubError) as cut:
            pushing.push(folder, name, pr=pr)
        assert cut.value.hint == "run the same command again: what has arrived is kept"
        hub.faults.clear()
        done = pushing.push(folder, name, pr=pr)
        revision = "refs/pr/1" if pr else "main"
        assert arrived(hub, name, revision) == arrived(hub, "alice/measured", revision), point
        assert commits(hub, name, revision) == 1, point
        assert len(hub.store.repos[name].discussions) == int(pr), point
        assert done.commit == hub.store.repos[name].resolve(revision).sha
        hub.faults.clear()


@pytest.mark.parametrize("kind", ["lost", "error", "busy"])
def test_what_passes_is_waited_for(hub: Hub, folder: Path, waits: list[float], kind: Kind) -> None:
    """Every request of a push fails once; the push does not."""
    points = requests_of_a_push(hub, folder)
    for point in range(points):
        hub.faults.add(kind, at=point)
        pushing.push(folder, f"alice/{kind}-{point}")
        hub.faults.clear()
        assert arrived(hub, f"alice/{kind}-{point}") == arrived(hub, "alice/measured"), point
        assert commits(hub, f"alice/{kind}-{point}") == 1, point
    assert waits
    assert all(1 <= seconds <= 1.25 for seconds in waits), "the first wait is short; 429 said one second"


def test_an_address_that_is_none_is_not_waited_for(
    hub: Hub, folder: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "hub.example")
    with pytest.raises(HubError, match=r"'hub\.example' is not the address of a Hub") as refused:
        pushing.push(folder, "alice/small")
    assert "HF_ENDPOINT" in str(refused.value.hint)
    assert not waits


def test_waits_grow(hub: Hub, folder: Path, waits: list[float]) -> None:
    hub.faults.add("down")
    with pytest.raises(HubError):
        pushing.push(folder, "alice/small")
    assert len(waits) == 5
    assert all(2**i <= seconds <= 1.25 * 2**i for i, seconds in enumerate(waits))


def test_somebody_else_pushes_meanwhile(hub: Hub, folder: Path) -> None:
    pushing.push(folder, "alice/small")
    repo = hub.store.repos["alice/small"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# New\n")

    def theirs(method: str, path: str) -> bool:
        if method == "POST" and "/preupload/" in path:
            repo.commit("refs/heads/main", "theirs", "bob", {"README.md": hub.store.put(b"theirs", False)})
        return False

    hub.faults.add("cut", matches=theirs)
    with pytest.raises(HubError, match="was changed while pushing"):
        pushing.push(folder, "alice/small")
    assert (hub.store.folder / arrived(hub, "alice/small")["README.md"]).read_bytes() == b"theirs"


def test_what_others_made_is_not_overwritten(hub: Hub, folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    (theirs / "pytorch_model.bin").write_bytes(b"x")
    hub.store.upload("alice/theirs", theirs)
    with pytest.raises(HubError, match="holds files that hfquant did not make"):
        check_access("alice/theirs")
    with pytest.raises(HubError, match="holds files that hfquant did not make"):
        pushing.push(folder, "alice/theirs")
    assert commits(hub, "alice/theirs") == 1
    pushing.push(folder, "alice/theirs", force=True)
    assert "pytorch_model.bin" not in arrived(hub, "alice/theirs")
    assert commits(hub, "alice/theirs") == 2


@pytest.mark.parametrize("name", ["report.json", "config.json"])
def test_what_hfquant_made_without_provenance_is_known(hub: Hub, folder: Path, tmp_path: Path, name: str) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    document = {"schema": 1, "hfquant": "0.1.0"}
    if name == "config.json":
        document = {"quantization_config": {"quant_method": "gptq", "meta": {"quantizer": ["hfquant"]}}}
    (ours / name).write_text(json.dumps(document))
    hub.store.upload("alice/ours", ours)
    assert check_access("alice/ours").exists


def test_who_may_not_push(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.create("alice/small")
    hub.store.orgs["company"] = {"alice"}
    assert check_access("company/new").exists is False
    assert check_access("new").repo == "alice/new"
    log_in(monkeypatch, hub, "bob")
    for repo, problem in (
        ("alice/small", "rights"),
        ("alice/new", "may not create"),
        ("company/new", "may not create"),
    ):
        with pytest.raises(HubError, match=problem):
            pushing.push(folder, repo)
    with pytest.raises(HubError, match="does not exist yet"):
        check_access("bob/none", pr=True)
    for bad in ("a/b/c", "../x", "bob/..", "bob/x;rm", ""):
        with pytest.raises(HubError):
            check_access(bad)
    hub.store.read_only.add(TOKENS["bob"])
    with pytest.raises(HubError, match="may only read"):
        check_access("bob/small")
    log_in(monkeypatch, hub, None)
    with pytest.raises(HubError, match="not logged in"):
        check_access("alice/small")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    with pytest.raises(HubError, match="Invalid") as wrong:
        check_access("alice/small")
    assert "wrongwrong" not in str(wrong.value)


def test_private_repositories(hub: Hub, folder: Path) -> None:
    pushing.push(folder, "alice/closed", private=True)
    pushing.push(folder, "alice/open")
    assert hub.store.repos["alice/closed"].private is True
    assert hub.store.repos["alice/open"].private is False
    with pytest.raises(HubError, match="exists and is public"):
        pushing.push(folder, "alice/open", private=True)


def test_what_came_from_a_gated_model_is_gated_and_private(hub: Hub, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["source"] |= {"gated": "manual"}
    (folder / "report.json").write_text(json.dumps(report))
    hub.faults.add("down", matches=lambda method, path: method == "PUT" and path.endswith("/settings"))
    with pytest.raises(HubError):
        pushing.push(folder, "alice/gated")
    hub.faults.clear()
    assert not arrived(hub, "alice/gated"), "nothing is there before the gate is"
    pushing.push(folder, "alice/gated")
    assert (hub.store.repos["alice/gated"].gated, hub.store.repos["alice/gated"].private) == ("manual", True)
    pushing.push(folder, "alice/branch", revision="w4", private=False)
    assert (hub.store.repos["alice/branch"].gated, hub.store.repos["alice/branch"].private) == ("manual", False)


def test_only_what_was_measured_and_is_good_leaves_the_house(hub: Hub, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    bad = {**report, "gate": {"passed": False, "broken": ["perplexity is 9 times the original's"]}}
    (folder / "report.json").write_text(json.dumps(bad))
    with pytest.raises(QualityError, match="9 times"):
        pushing.push(folder, "alice/bad")
    (folder / "report.json").write_text(json.dumps({**report, "evaluation": None}))
    with pytest.raises(QualityError, match="never measured"):
        pushing.push(folder, "alice/bad")
    assert not hub.faults.log, "the Hub is not asked"
    pushing.push(folder, "alice/bad", force=True)
    assert commits(hub, "alice/bad") == 1


def test_secrets_and_foreign_files_stay(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    pushing.push(folder, "alice/small")
    assert "notes.txt" not in arrived(hub, "alice/small")
    (folder / "generation_config.json").write_text(json.dumps({"t": TOKENS["bob"]}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds what looks like an access token"):
        pushing.push(folder, "alice/small")
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        pushing.push(tmp_path, "alice/small")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        pushing.push(folder, "alice/small")


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text_passes_the_hubs_validation_as_text(hub: Hub, folder: Path, evil: str) -> None:
    """A model's name, licence and chat template as bad as can be: the card stays a card, the titles stay titles."""
    report = json.loads((folder / "report.json").read_text())
    terms = {"license": "other", "license_name": evil, "license_link": evil}
    report["source"] |= {"id": evil, "revision": evil, **terms}
    report["sample"]["original"] = report["layers"][0]["name"] = evil
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "chat_template.jinja").write_text(evil)
    report["output"]["files"].append("chat_template.jinja")
    (folder / "report.json").write_text(json.dumps(report))
    card.write(folder, report)
    done = pushing.push(folder, "alice/small")
    data = HfApi().model_info("alice/small").card_data
    assert data is not None
    assert set(data.to_dict()) == {"library_name", "license", "license_name", "model-index", "pipeline_tag", "tags"}
    assert data.license_name == "unknown"
    title = hub.store.repos["alice/small"].commits[done.commit].title
    assert title.isprintable()
    assert len(title) < 150


def test_a_hub_that_keeps_something_else_is_found_out(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = hub.store.put

    def careless(content: bytes, large: bool) -> Any:
        return put(content.replace(b'"model_type"', b'"model_tYpe"') if not large else content, large)

    monkeypatch.setattr(hub.store, "put", careless)
    with pytest.raises(HubError, match=r"is not what was pushed: config\.json has another content"):
        pushing.push(folder, "alice/small")
