"""A repository whose files have names made to cause harm: nothing is written outside a job's folder, nor twice."""

import hashlib
from pathlib import Path

import pytest

from hfquant.conversion.pull import pull
from hfquant.errors import HfquantError
from hfquant.model.remote import look
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub
from tests.hub.store import pointer

from .conftest import Desk

OUTSIDE = [
    "../stolen.json", "../../../stolen.json", "sub/../../stolen.json", "/tmp/hfquant-stolen.json", "..\\stolen.json",
    "C:\\stolen.json", "a\0b.json", "line\nend.json", "\x1b[31mred.json", "txt.\u202egpj.json", "x" * 300 + ".json",
    "/".join(["deep"] * 300) + "/x.json", ".cache/huggingface/x.json", "Config.json",
]  # fmt: skip


def add(hub: Hub, files: dict[str, bytes], repo: str = "alice/model") -> None:
    changes = {name: hub.store.put(content, False) for name, content in files.items()}
    hub.store.repos[repo].commit("refs/heads/main", "more", "alice", changes)


def told(desk: Desk) -> tuple[str, str]:
    """How the next job fails: the kind of its error, and the words."""
    failed = desk.ended(desk.submit())
    assert failed.failure is not None, failed
    return failed.failure.kind, failed.failure.message


def test_refused_before_anything_is_fetched(desk: Desk, model: Path) -> None:
    """Each in words; no such file is asked for, and none is anywhere on this disk."""
    desk.work(real=False)
    for name in OUTSIDE:
        replaced(desk, model, {name: b"stolen"})
        desk.hub.faults.log.clear()
        kind, message = told(desk)
        assert (kind, "cannot be fetched: it" in message) == ("SourceError", True), (name, message)
        assert message.isprintable()
        fetched = {e.rpartition("/")[2] for e in desk.hub.faults.log if "/resolve/" in e}
        assert fetched == {"config.json", "model.safetensors"}, "their headers"
        assert not desk.service.preview(desk.request(), token=TOKENS["alice"]).allowed
    everywhere = [*desk.folder.rglob("*"), *Path("/tmp").glob("hfquant-stolen*")]
    assert [path for path in everywhere if "stolen" in path.name] == []
    assert desk.workers[0].poll() is None


def test_names_of_files_that_are_not_needed_do_not_matter(desk: Desk) -> None:
    add(desk.hub, {"../a picture.png": b"x", "evil\0.bin": b"x", "EVIL.bin": b"x", "evil.bin": b"x", "x" * 300: b"x"})
    desk.work(real=False)
    assert desk.ended(desk.submit()).state == "done"
    assert set(desk.arrived("alice/small")) >= {"model.safetensors", "config.json"}


@pytest.mark.parametrize("name", OUTSIDE[:10], ids=lambda name: ascii(name)[:30])
def test_the_client_would_not_write_elsewhere_either(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A second wall, should a name ever get past the first one."""
    add(desk.hub, {name: b"stolen"})
    monkeypatch.setattr("hfquant.conversion.pull.objection", lambda names: None)
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    before = outside(tmp_path, inside)
    try:
        pull(look("alice/model", None), inside, None, lambda: None, lambda text: None)
    except (HfquantError, ValueError, OSError):
        pass
    else:
        assert any(path.read_bytes() == b"stolen" for path in inside.rglob("*") if path.is_file()), "confined"
    assert outside(tmp_path, inside) == before
    assert not Path("/tmp/hfquant-stolen.json").exists()


def outside(folder: Path, inside: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_relative_to(inside) and "hub" not in path.parts}


def test_links_and_pointers_are_texts(desk: Desk, model: Path) -> None:
    """A link in git, or a pointer to somebody's large file, is a file that holds a path: nothing follows it."""
    secret = desk.hub.store.put(b"bob's" * 1000, True)
    desk.hub.store.create("bob/secret", private=True).commit("refs/heads/main", "x", "bob", {"x.bin": secret})
    foreign, link = pointer(secret.sha256, secret.size), b"../../../../../../../../etc/passwd"
    cases = [
        ("config.json", link, "SourceError", "is not JSON"),
        ("config.json", foreign, "SourceError", "is not JSON"),
        ("model.safetensors", foreign, "SourceError", "its header cannot be read"),
        ("tokenizer.json", link, "CheckpointError", "has no tokenizer"),
    ]
    desk.work()
    for name, content, kind, words in cases:
        replaced(desk, model, {name: content})
        found = told(desk)
        assert (found[0], words in found[1]) == (kind, True), found
        assert "root:" not in found[1]
    replaced(desk, model, {"generation_config.json": foreign, "LICENSE": link})
    assert desk.ended(desk.submit()).state == "done"
    arrived = desk.arrived("alice/small")
    assert secret.sha256 not in arrived.values()
    assert hashlib.sha256(Path("/etc/passwd").read_bytes()).hexdigest() not in arrived.values()


def replaced(desk: Desk, model: Path, files: dict[str, bytes]) -> None:
    """The model as it was, but for these files."""
    del desk.hub.store.repos["alice/model"]
    desk.hub.store.upload("alice/model", model)
    add(desk.hub, files)
