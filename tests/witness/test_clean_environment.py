"""From nothing: hfquant installed into an environment of its own, one model compressed, pushed, forgotten, loaded.

With HFQUANT_TEST_MODEL=FOLDER, or the path of a GGUF file, a real model is taken, otherwise a small one that is trained
for it; HFQUANT_TEST_RECIPE is the recipe.
"""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hfquant.recipe_source import presets
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
def watched(*words: str) -> Iterator[dict[str, list[str]]]:
    """Word -> command lines of any process that held it meanwhile."""
    found: dict[str, list[str]] = {word: [] for word in words}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    line = path.read_bytes().decode(errors="replace")
                except OSError:
                    continue  # it has ended
                for word in words:
                    if word in line:
                        found[word].append(line)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def holding(secret: str, *folders: Path) -> list[Path]:
    """The files that hold it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks at the process list as Linux has it")
@pytest.mark.parametrize("pr", [False, True], ids=["commit", "pull request"])
def test_compressed_pushed_forgotten_and_loaded(
    pr: bool, hub: Hub, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    given = Path(os.environ.get("HFQUANT_TEST_MODEL") or trained("llama"))
    source = tmp_path / given.name
    shutil.copytree(given, source) if given.is_dir() else shutil.copy(given, source)
    program = environment.ours(ROOT)
    hub.store.tokens[CANARY] = "alice"
    if pr:
        hub.store.create("alice/small")
    home, small = tmp_path / "home", tmp_path / "small"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url}
    env |= {"HF_TOKEN": CANARY, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    said = ""

    def run(*words: str | Path) -> None:
        nonlocal said
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, cwd=tmp_path)
        said += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr[-3000:]

    hfquant, script, recipe = program.with_name("hfquant"), tmp_path / "load.py", os.environ.get("HFQUANT_TEST_RECIPE")
    script.write_text(LOAD)
    with watched(CANARY, "alice/small") as seen:
        run(hfquant, "compress", source, "--recipe", recipe or "rtn-w8g32sym", "--out", small)
        run(hfquant, "diagnose", small, "--quick")
        run(program, script, small, "main", tmp_path / "before")
        run(hfquant, "push", small, "alice/small", *(["--pr"] if pr else []))
        left = holding(CANARY, small, home)
        shutil.rmtree(source) if source.is_dir() else source.unlink()
        shutil.rmtree(small)
        shutil.rmtree(home)
        run(program, script, "alice/small", "refs/pr/1" if pr else "main", tmp_path / "after")
    for i in range(2):
        before, after = (torch.from_numpy(np.load(tmp_path / f"{name}.{i}.npy")) for name in ("before", "after"))
        assert torch.equal(before, after)
    revision = "refs/pr/1" if pr else "main"
    there = hub.store.repos["alice/small"].resolve(revision).files
    assert {"README.md", "hfquant.json", "report.json", "figures/bits.png"} <= there.keys()
    assert CANARY in hub.seen_tokens, "it was used"
    assert seen["alice/small"], "the commands were seen"
    assert (seen[CANARY], left, holding(CANARY, hub.store.folder), CANARY in said) == ([], [], [], False)


def test_optimum_finds_what_is_installed() -> None:
    """The file in the folder that optimum's own package lies in, too."""
    words = [str(environment.ours(ROOT).with_name("optimum-cli")), "hfquant"]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert {"compress", "eval", "push", "diagnose"} <= set(re.findall(r"\w+", done.stdout))
    wrong = subprocess.run([*words, "push", "none", "alice/x"], capture_output=True, text=True, cwd="/")
    assert (wrong.returncode, "`none`" in wrong.stderr) == (2, True)


def test_what_is_installed_brings_its_data() -> None:
    """Recipes, texts, questions and the card's template, none of which is Python."""
    code = "from hfquant.measure import card, questions; from hfquant.model import texts\n"
    code += "from hfquant.recipe_source import presets\n"
    code += "print(len(presets()), *questions.packaged(), len(texts.packaged('evaluation')) > 1000,"
    code += " (card.TEMPLATES / 'card.md.jinja').is_file(), (questions.PACKAGED / 'LICENSES.md').is_file())"
    done = subprocess.run(
        [str(environment.ours(ROOT)), "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    count, *rest = done.stdout.split()
    assert int(count) == len(presets())
    assert rest == ["arc_easy", "hellaswag", "piqa", "winogrande", "True", "True", "True"]
