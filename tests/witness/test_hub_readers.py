"""What was pushed to the tests' Hub, read by programs that neither hfquant nor the Hub's Python client has a part in:
the official JavaScript client, and the mirror olah, behind which another client stands."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, snapshot_download

from hfquant.compress import compress
from hfquant.conversion import hub as pushing
from hfquant.measure.verify import verify
from tests import families
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub
from tests.witness import environment

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed and measured model."""
    folder = tmp_path_factory.mktemp("witness")
    source = families.build("llama", folder / "source")
    for _ in compress(source, "rtn-w4g32", folder / "small"):
        pass
    verify(folder / "small", windows=2, window_len=32, new_tokens=2, enforce=False)
    return folder / "small"


def pushed(hub: Hub, name: str, revision: str = "main") -> dict[str, list[object]]:
    files = hub.store.repos[name].resolve(revision).files
    return {path: [blob.size, blob.sha256] for path, blob in files.items()}


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_the_javascript_client_reads_what_was_pushed(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, xet: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.xet.enabled = xet
    pushing.push(small, "alice/small", private=True)
    for blob in hub.store.repos["alice/small"].resolve("main").files.values():
        if blob.large and hub.store.stored(blob.sha256) is None:
            assert hub.xet.fetch(blob.sha256, hub.store.folder), "put together from its chunks"
    hub.xet.enabled = False  # its own Xet reader wants a server of chunks, not a folder: files are served as they are
    folder = environment.node("@huggingface/hub@2.17.5")
    script = Path(__file__).with_name("read.mjs")
    words = ["node", str(script), str(folder), hub.url, "alice/small", "main", TOKENS["alice"]]
    said = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert said["files"] == pushed(hub, "alice/small")
    assert (said["name"], said["private"]) == ("alice/small", True)


@contextmanager
def olah(hub: Hub, folder: Path) -> Iterator[str]:
    """The mirror, running in front of a Hub: its address."""
    program = environment.python("olah", ("olah==0.5.4",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    origin, files = (url.removeprefix("http://") for url in (hub.url, hub.files_url))
    words = [
        str(program.with_name("olah-cli")), "--host", "127.0.0.1", "--port", str(port),
        "--hf-scheme", "http", "--hf-netloc", origin, "--hf-lfs-netloc", files,
        "--mirror-scheme", "http", "--mirror-netloc", f"127.0.0.1:{port}", "--mirror-lfs-netloc", f"127.0.0.1:{port}",
        "--repos-path", str(folder / "repos"), "--log-path", str(folder / "logs"),
    ]  # fmt: skip
    with (folder / "olah.log").open("w") as log:
        running = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait(f"http://127.0.0.1:{port}", running)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            running.wait(20)


def _wait(url: str, running: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert running.poll() is None, "the mirror has ended"
        try:
            httpx2.get(url, timeout=2)
            return
        except httpx2.TransportError:
            time.sleep(0.2)
    raise AssertionError("the mirror does not answer")


def test_a_mirror_serves_what_was_pushed(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushing.push(small, "alice/small")
    with olah(hub, tmp_path) as mirror:
        api = HfApi(endpoint=mirror)
        assert api.model_info("alice/small").sha == hub.store.repos["alice/small"].resolve("main").sha
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", mirror + "/{repo_id}/resolve/{revision}/{filename}"
        )
        before = len(hub.faults.log)
        folder = Path(snapshot_download("alice/small", endpoint=mirror, local_dir=tmp_path / "copy", etag_timeout=60))
        asked = [entry for entry in hub.faults.log[before:] if "/resolve/" in entry]
    assert asked, "the mirror fetched them"
    for file in small.rglob("*"):
        if file.is_file() and file.name not in ("report.json", ".gitattributes"):
            assert (folder / file.relative_to(small)).read_bytes() == file.read_bytes(), file.name
