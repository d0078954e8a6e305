"""From nothing: hfquant installed into an environment of its own, one model compressed, pushed, forgotten, loaded.

With HFQUANT_TEST_MODEL=FOLDER a real model is taken, otherwise a small one that is trained for it.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hub.server import Hub
from tests.witness import environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
CANARY = "hf_" + "Canary7" * 5
LOAD = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import hfquant
name, revision, out = sys.argv[1:]
AutoTokenizer.from_pretrained(name, revision=revision)
for i, model in enumerate((hfquant.load(name, revision=revision),
                           AutoModelForCausalLM.from_pretrained(name, revision=revision))):
    with torch.inference_mode():
        np.save(f"{out}.{i}.npy", model.eval()(torch.arange(4, 36)[None]).logits.float().numpy())
"""


@contextmanager
def watched(secret: str) -> Iterator[list[str]]:
    """Command lines of any process that held a secret meanwhile."""
    found: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes()
                except OSError:
                    continue  # it has ended
                if secret.encode() in line:
                    found.append(line.decode(errors="replace"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks at the process list as Linux has it")
@pytest.mark.parametrize("pr", [False, True], ids=["commit", "pull request"])
def test_compressed_pushed_forgotten_and_loaded(
    pr: bool, hub: Hub, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(os.environ.get("HFQUANT_TEST_MODEL") or trained("llama"))
    program = environment.python("clean", ("torch==2.13.0",), ("-c", str(ROOT / "constraints.txt"), str(ROOT)))
    hub.store.tokens[CANARY] = "alice"
    if pr:
        hub.store.create("alice/small")
    home = tmp_path / "home"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url}
    env |= {"HF_TOKEN": CANARY, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    said = ""

    def run(*words: str | Path) -> None:
        nonlocal said
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, cwd=tmp_path)
        said += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-3000:]

    hfquant, script = program.with_name("hfquant"), tmp_path / "load.py"
    script.write_text(LOAD)
    with watched(CANARY) as seen:
        run(hfquant, "compress", source, "--recipe", "rtn-w8g32sym", "--out", tmp_path / "small")
        run(hfquant, "diagnose", tmp_path / "small", "--quick")
        run(program, script, tmp_path / "small", "main", tmp_path / "before")
        run(hfquant, "push", tmp_path / "small", "alice/small", *(["--pr"] if pr else []))
        texts = [path for path in (tmp_path / "small").rglob("*") if path.suffix in (".json", ".md")]
        left = [path for path in texts if CANARY in path.read_text()]
        shutil.rmtree(tmp_path / "small")
        shutil.rmtree(home)
        run(program, script, "alice/small", "refs/pr/1" if pr else "main", tmp_path / "after")
    for i in range(2):
        before, after = (torch.from_numpy(np.load(tmp_path / f"{name}.{i}.npy")) for name in ("before", "after"))
        assert torch.equal(before, after)
    revision = "refs/pr/1" if pr else "main"
    there = hub.store.repos["alice/small"].resolve(revision).files
    assert {"README.md", "hfquant.json", "report.json", "figures/bits.png"} <= there.keys()
    published = [
        path for path, blob in there.items() if CANARY.encode() in (hub.store.folder / blob.sha256).read_bytes()
    ]
    assert (seen, left, published, CANARY in said) == ([], [], [], False)
