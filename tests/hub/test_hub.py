"""The Hub for tests, spoken to by the real client: what it says is what huggingface.co would say."""

import os
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from torch import arange

from .faults import Kind
from .fixtures import log_in
from .server import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A large file in three parts, one in a folder, a card, an empty file."""
    made = tmp_path / "model"
    (made / "more").mkdir(parents=True)
    save_file({"a.b": arange(600_000).float(), "c": arange(3)}, made / "model.safetensors")
    (made / "README.md").write_text("---\nlicense: mit\ntags:\n- x\n---\n# Card\n")
    (made / "config.json").write_text("{}")
    (made / "more" / "notes.txt").write_text("ä")
    (made / "empty.txt").touch()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and ".cache" not in f.parts and f.name != ".gitattributes"
    }


@pytest.mark.parametrize("xet", [False, True])
def test_what_is_uploaded_comes_back(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xet: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.xet.enabled = xet
    api = HfApi()
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/model")
    api.create_repo("alice/model", exist_ok=True)
    done = api.upload_folder(repo_id="alice/model", folder_path=folder)
    back = Path(snapshot_download("alice/model", local_dir=tmp_path / "back"))
    assert contents(back) == contents(folder)
    assert bool(hub.faults.asked("POST", "/lfs/complete/")) is not xet
    assert bool(hub.xet.files()) is xet
    files = {
        f.path: f for f in api.list_repo_tree("alice/model", revision=done.oid, recursive=True) if hasattr(f, "size")
    }
    assert files["model.safetensors"].lfs is not None
    assert files["model.safetensors"].size == (folder / "model.safetensors").stat().st_size
    sizes = api.get_safetensors_metadata("alice/model")
    assert sizes.parameter_count == {"F32": 600_000, "I64": 3}
    assert len(hub.faults.asked("GET", "/stored/")) >= 1


def test_a_second_upload_changes_nothing(hub: Hub, folder: Path) -> None:
    api = HfApi()
    api.create_repo("alice/model")
    first = api.upload_folder(repo_id="alice/model", folder_path=folder)
    assert api.upload_folder(repo_id="alice/model", folder_path=folder).oid == first.oid
    assert [c.title for c in api.list_repo_commits("alice/model")] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]


def test_pull_requests(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.create("alice/model")
    log_in(monkeypatch, hub, "bob")
    api = HfApi()
    pr = api.create_pull_request("alice/model", "better")
    assert pr.git_reference == "refs/pr/1"
    add = CommitOperationAdd("new.txt", b"new")
    done = api.create_commit("alice/model", [add], commit_message="add", revision="refs/pr/1")
    assert Path(hf_hub_download("alice/model", "new.txt", revision="refs/pr/1")).read_text() == "new"
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("alice/model", "new.txt")
    add = CommitOperationAdd("newer.txt", b"newer")
    at_once = api.create_commit("alice/model", [add], commit_message="again", create_pr=True)
    assert at_once.pr_num == 2
    api.create_pull_request("alice/model", "third")
    assert [d.num for d in api.get_repo_discussions("alice/model", author="bob")] == [1, 2, 3]
    with pytest.raises(HfHubHTTPError, match="rights"):
        api.merge_pull_request("alice/model", 1)
    log_in(monkeypatch, hub, "alice")
    HfApi().merge_pull_request("alice/model", 1)
    assert HfApi().file_exists("alice/model", "new.txt")
    assert done.oid in hub.store.repos["alice/model"].commits


def test_a_parent_guards_against_other_commits(hub: Hub) -> None:
    repo = hub.store.create("alice/model")
    head = repo.resolve("main").sha
    api = HfApi()
    api.create_commit("alice/model", [CommitOperationAdd("a", b"a")], commit_message="a", parent_commit=head)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("alice/model", [CommitOperationAdd("b", b"b")], commit_message="b", parent_commit=head)
    assert refused.value.response.status_code == 412


def test_branches_tags_and_commits(hub: Hub) -> None:
    repo = hub.store.create("alice/model")
    api = HfApi()
    api.create_branch("alice/model", branch="v/1")
    api.create_commit("alice/model", [CommitOperationAdd("a", b"a")], commit_message="a", revision="v/1")
    api.create_tag("alice/model", tag="t", revision="v/1")
    assert {ref.name for ref in api.list_repo_refs("alice/model").branches} == {"main", "v/1"}
    assert api.file_exists("alice/model", "a", revision="t")
    assert not api.file_exists("alice/model", "a", revision=repo.resolve("main").sha[:10])
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/model", revision="none")


def test_who_may_do_what(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.upload("alice/private", folder, private=True)
    gated = hub.store.upload("alice/gated", folder, gated="manual")
    hub.store.create("alice/open")
    log_in(monkeypatch, hub, "bob")
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/private")
    assert api.model_info("alice/gated").gated == "manual"
    with pytest.raises(GatedRepoError):
        hf_hub_download("alice/gated", "config.json")
    with pytest.raises(GatedRepoError):
        api.auth_check("alice/gated")
    gated.granted.add("bob")
    assert hf_hub_download("alice/gated", "config.json")
    for refused in (
        lambda: api.auth_check("alice/open", write=True),
        lambda: api.create_commit("alice/open", [CommitOperationAdd("a", b"a")], commit_message="a"),
        lambda: api.create_repo("alice/mine"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            refused()
        assert error.value.response.status_code == 403
    log_in(monkeypatch, hub, None)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("alice/none")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        HfApi().whoami()


def test_metadata_is_validated(hub: Hub) -> None:
    hub.store.create("alice/model")
    bad = CommitOperationAdd("README.md", b"---\nlicense: other\ntags: [1]\n---\n")
    with pytest.raises(ValueError, match=r"(?s)tags.*license_name"):
        HfApi().create_commit("alice/model", [bad], commit_message="a")


@pytest.mark.parametrize("kind", ["cut", "lost", "half", "error", "busy"])
def test_faults_are_seen_and_pass(hub: Hub, folder: Path, tmp_path: Path, kind: Kind) -> None:
    hub.store.upload("alice/model", folder)
    hub.faults.add(kind, times=1, matches=lambda method, path: method == "GET" and "config.json" in path)
    with suppress(httpx2.HTTPError):  # which of them the client retries is its own affair
        hf_hub_download("alice/model", "config.json", local_dir=tmp_path / "one")
    assert hf_hub_download("alice/model", "config.json", local_dir=tmp_path / "one")
    assert len(hub.faults.asked("GET", "config.json")) == 2


def test_a_hub_that_is_down_stays_down(hub: Hub) -> None:
    hub.store.create("alice/model")
    hub.faults.add("down", at=1)
    HfApi().model_info("alice/model")
    for _ in range(2):
        with pytest.raises(httpx2.NetworkError):
            HfApi().model_info("alice/model")
    hub.faults.clear()
    assert HfApi().model_info("alice/model").id == "alice/model"


def test_the_real_hub_is_out_of_reach(hub: Hub) -> None:
    assert constants.ENDPOINT.startswith("http://127.0.0.1:")
    assert os.environ["HF_TOKEN"].startswith("hf_aaa")
