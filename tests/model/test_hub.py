"""A model on the Hub: what is refused before any weight is fetched, and what is fetched."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from hfquant.errors import HfquantError, ResourceError, SourceError
from hfquant.measure.original import facts
from hfquant.model import hub as fetching
from hfquant.model.source import open_source
from tests.hub.fixtures import log_in
from tests.hub.server import Hub


@pytest.fixture
def model(built: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("llama"), tmp_path / "model"))


def fetched(hub: Hub) -> set[str]:
    """The files whose bytes were asked for."""
    names = {entry.rpartition("/")[2] for entry in hub.faults.asked("GET", "/resolve/")}
    return names - {"model.safetensors"} | {"weights" for _ in hub.faults.asked("GET", "/stored/")}


def test_only_what_is_needed_is_fetched(hub: Hub, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "modeling_x.py").write_text("raise SystemExit")
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"onnx")
    repo = hub.store.upload("alice/model", model)
    source = open_source("alice/model")
    assert source.revision == repo.resolve("main").sha
    names = {str(f.relative_to(source.path)) for f in source.path.rglob("*") if f.is_file()}
    assert "model.safetensors" in names
    assert "tokenizer.json" in names
    assert not names & {"pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "onnx/model.onnx"}
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


def test_a_commit_can_be_pinned_and_the_cache_serves_without_a_connection(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.store.upload("alice/model", model).resolve("main").sha
    hub.store.repos["alice/model"].commit(
        "refs/heads/main", "later", "alice", {"new.txt": hub.store.put(b"new", False)}
    )
    assert open_source("alice/model", first).revision == first
    latest = open_source("alice/model")
    assert latest.revision == hub.store.repos["alice/model"].resolve("main").sha
    hub.faults.add("down")
    assert open_source("alice/model").path == latest.path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source("alice/model").path == latest.path
    with pytest.raises(SourceError, match="cannot be reached"):
        open_source("alice/other")


def test_licence_and_gate_are_known(hub: Hub, model: Path) -> None:
    card = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n# Hi\n"
    (model / "README.md").write_text(card)
    hub.store.upload("alice/model", model, gated="auto", private=True)
    terms = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    assert facts(open_source("alice/model")) == {**terms, "gated": "auto", "private": True}
    assert facts(open_source(model)) == terms


def refuse(hub: Hub, problem: str, kind: type[HfquantError] = SourceError, revision: str | None = None) -> None:
    """Refused in these words, and no weights were fetched."""
    with pytest.raises(kind, match=problem) as refused:
        open_source("alice/model", revision)
    assert refused.value.hint
    assert not [e for e in hub.faults.asked("GET", "/stored/")] or "is damaged" in problem


def test_gated(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.upload("alice/model", model, gated="manual")
    log_in(monkeypatch, hub, "bob")
    refuse(hub, "alice/model is gated")
    hub.store.repos["alice/model"].granted.add("bob")
    assert open_source("alice/model").facts["gated"] == "manual"


def test_private_and_missing(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(hub, "not on the Hub, or private")
    hub.store.upload("alice/model", model, private=True)
    refuse(hub, "no revision `v9`", revision="v9")
    log_in(monkeypatch, hub, "bob")
    refuse(hub, "not on the Hub, or private")
    log_in(monkeypatch, hub, None)
    refuse(hub, "not on the Hub, or private")


def test_pickles(hub: Hub, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    hub.store.upload("alice/model", model)
    refuse(hub, r"only pickled weights \(pytorch_model\.bin\)")
    assert not fetched(hub)


def test_no_weights_and_no_config(hub: Hub, model: Path) -> None:
    (model / "model.safetensors").unlink()
    hub.store.upload("alice/model", model)
    refuse(hub, r"no \*\.safetensors file")
    del hub.store.repos["alice/model"]
    (model / "config.json").unlink()
    hub.store.upload("alice/model", model)
    refuse(hub, r"no config\.json")


def test_remote_code(hub: Hub, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    hub.store.upload("alice/model", model)
    refuse(hub, "brings its own modelling code")
    assert fetched(hub) == {"config.json"}
    assert not (tmp_path / "ran").exists()


def test_quantized_already(hub: Hub, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    hub.store.upload("alice/model", model)
    refuse(hub, r"already quantized \(awq\)")


def test_cut_short(hub: Hub, model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1000])
    hub.store.upload("alice/model", model)
    refuse(hub, r"model\.safetensors of alice/model is damaged: .* bytes are promised")
    del hub.store.repos["alice/model"]
    (model / "model.safetensors").write_bytes(b"\xff" * 5000)
    hub.store.upload("alice/model", model)
    refuse(hub, r"model\.safetensors of alice/model is damaged: its header")
    sizes = [entry for entry in hub.faults.log if entry.startswith("GET /stored")]
    assert len(sizes) == 2, "headers only"


def test_a_disk_that_is_too_small(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.upload("alice/model", model)
    monkeypatch.setattr(fetching, "MARGIN", 10**18)
    with pytest.raises(ResourceError, match="are free on the disk"):
        open_source("alice/model")
    monkeypatch.undo()


def test_nobody_there(hub: Hub) -> None:
    hub.faults.add("down")
    refuse(hub, "the Hub cannot be reached")
