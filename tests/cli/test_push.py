"""`hfquant push` and `compress --push`: in this process for what they say, in others for what they leak."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import Result

import hfquant
from hfquant.cli import engine
from hfquant.errors import HubError
from tests.cli.conftest import Engine
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

Run = Callable[..., Result]
CANARY = "hf_" + "CanaryCanary0123456789CanaryCanary"
LOAD = """
import sys, torch, hfquant
torch.set_num_threads(1)
with torch.inference_mode():
    logits = hfquant.load(sys.argv[1]).eval()(torch.arange(4, 36)[None]).logits
torch.save(logits, sys.argv[2])
"""


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    found: Tensor = hfquant.load(folder).eval()(torch.arange(4, 36)[None]).logits
    return found


@pytest.fixture
def folder(run: Run, built: Callable[[str], Path], tmp_path: Path) -> Path:
    done = run("compress", built("llama"), "-r", "rtn-w8", "-o", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    return tmp_path / "small"


def test_push_says_where_it_is(run: Run, hub: Hub, folder: Path) -> None:
    done = run("push", folder, "alice/small", "--private")
    assert done.exit_code == 0, done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["pushed"] == f"{hub.url}/alice/small"
    assert facts["commit"] == hub.store.repos["alice/small"].resolve("main").sha
    assert facts["files"].endswith("all compared with the Hub's")
    assert hub.store.repos["alice/small"].private
    again = json.loads(run("push", folder, "small", "--json").stdout)
    assert (again["changed"], again["repo"], again["revision"]) == (False, "alice/small", "main")


def test_what_the_hub_refuses_is_said_with_a_way_out(run: Run, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.store.create("bob/small")
    done = run("push", folder, "bob/small")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "error: the Hub: You don't have the rights to write to this repository" in done.stderr
    assert "\n\nhint: use a token that may write there, or offer the files with `--pr`\n" in done.stderr
    offered = run("push", folder, "bob/small", "--pr")
    assert f"{hub.url}/bob/small/discussions/1" in offered.stdout
    assert run("push", tmp_path, "alice/small").exit_code == 2


def test_compress_asks_for_access_before_the_work(run: Run, fake: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise HubError("this token may only read", "make one that may write")

    monkeypatch.setattr(engine, "check_push", refused)
    done = run("compress", "org/model", "-r", "rtn-w4", "-o", "small", "--push", "alice/small")
    assert done.exit_code == 2
    assert done.stderr == "error: this token may only read\n\nhint: make one that may write\n"
    assert not fake.asked


def test_interrupt_while_pushing(run: Run, fake: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "check_push", lambda *_, **__: None)
    monkeypatch.setattr(engine, "push", interrupted)
    done = run("compress", "org/model", "-r", "rtn-w4", "-o", "small", "--push", "alice/small")
    assert done.exit_code == 130
    assert "error: interrupted: `small` is complete but not pushed" in done.stderr
    assert "hint: push it with `hfquant push small alice/small`" in done.stderr


def command_lines() -> str:
    """Of every process that can be seen."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return "\n".join(found)


def test_a_clean_process_from_end_to_end_and_the_canary(hub: Hub, built: Callable[[str], Path], tmp_path: Path) -> None:
    """Compress and push in one process, delete all, load in another: equal logits, and the token is nowhere."""
    hub.store.tokens[CANARY], hub.xet.enabled = "alice", True
    home, out = tmp_path / "home", tmp_path / "out"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": CANARY, "HF_HUB_OFFLINE": "0", "HF_DEBUG": "1"}
    command = [sys.executable, "-m", "hfquant", "compress", str(built("llama")), "-r", "rtn-w8", "-o", str(out)]
    seen, told = [], tmp_path / "told.txt"
    with (
        told.open("w") as output,
        subprocess.Popen([*command, "--push", "alice/small"], env=env, stdout=output, stderr=output) as working,
    ):
        while working.poll() is None:
            seen.append(command_lines())
            time.sleep(0.5)
    said = told.read_text()
    assert working.returncode == 0, said
    assert CANARY in hub.seen_tokens, "it is sent to the Hub"
    before = logits(out)
    written = [*out.rglob("*"), *home.rglob("*"), *hub.store.folder.rglob("*")]
    left = b"".join(path.read_bytes() for path in written if path.is_file())
    shutil.rmtree(out)
    shutil.rmtree(home)
    load = [sys.executable, "-c", LOAD, "alice/small", str(tmp_path / "after.pt")]
    loaded = subprocess.run(load, env=env, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert torch.equal(before, torch.load(tmp_path / "after.pt"))
    for token in (CANARY, CANARY[3:20], TOKENS["alice"]):
        assert token not in said + loaded.stdout + loaded.stderr
        assert token.encode() not in left
        assert not any(token in lines for lines in seen)
    assert any("alice/small" in lines for lines in seen), "the process was seen"


def test_from_a_gated_model_of_the_hub_to_the_hub(
    run: Run, hub: Hub, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """Licence, base model, gate and privacy are carried over; the base is named at the commit it had."""
    dense = Path(shutil.copytree(built("llama"), tmp_path / "dense"))
    terms = "license: other\nlicense_name: llama9\nlicense_link: https://example.org/LICENSE\n"
    (dense / "README.md").write_text(f"---\n{terms}---\n# Mine\n")
    base = hub.store.upload("bob/base", dense, gated="manual")
    base.granted.add("alice")
    done = run("compress", "bob/base", "-r", "rtn-w8", "-o", tmp_path / "small", "--push", "alice/small")
    assert done.exit_code == 0, done.stderr
    pushed = hub.store.repos["alice/small"]
    assert (pushed.private, pushed.gated) == (True, "manual")
    data = hub.store.card(pushed.resolve("main"))
    assert {key: data[key] for key in ("base_model", "base_model_relation", "license", "license_name")} == {
        "base_model": "bob/base",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "llama9",
    }
    origin = json.loads((hub.store.folder / pushed.resolve("main").files["hfquant.json"].sha256).read_text())
    assert (origin["base"]["id"], origin["base"]["revision"]) == ("bob/base", base.resolve("main").sha)
    assert origin["base"]["gated"] == "manual"
