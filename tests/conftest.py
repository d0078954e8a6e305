"""What every test runs under: no network, no progress bars, one thread, no memory that happens to be zero, and the
reference instead of kernels unless it says otherwise."""

import atexit
import gc
import hashlib
import inspect
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HFQUANT_KERNELS"] = "reference"  # layers compute what their weights say; kernels are tested as such
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # scipy's own threads spin: four times the work for matrices this small

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

if "HFQUANT_TESTS_CACHE" not in os.environ:  # one for all processes of a run, away from what other versions left
    os.environ["HFQUANT_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hfquant-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
import torch
import transformers
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfquant.measure.text import Text, cut
from hfquant.model.calibration import token_batches
from tests import families

pytest_plugins = ["tests.hub.fixtures", "tests.poison"]

transformers.utils.logging.disable_progress_bar()
# Models of a megabyte lose more to waiting for a second thread than it brings; on a busy machine, tenfold.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection of garbage, one after every block, need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or what libraries hold seems lost to them when the process ends, and they list it."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def tokenized_once() -> Iterator[None]:
    """The packaged texts take a second to tokenize: whoever asks a tokenizer that is the same gets the same answer."""
    call, known = PreTrainedTokenizerBase.__call__, {}

    def remembered(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(text, str) or len(text) < 100_000 or args or kwargs != {"verbose": False}:
            return call(self, text, *args, **kwargs)
        key = text, self.backend_tokenizer.to_str()
        if key not in known:
            known[key] = call(self, text, **kwargs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", remembered)
        yield


Make = Callable[[str, Path], object]
Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Make], Folders]:
    """common("built", make) -> a function from a name to the folder that make(name, folder) filled.

    Once in a run of the tests, however many processes share the work: the first to ask makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    return partial(_once, base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


def _once(root: Path, kind: str, make: Make) -> Folders:
    def folder(name: str) -> Path:
        made = root / kind / name
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{made}.lock"):
            if not made.exists():
                unfinished = made.with_name(f"{name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                make(name, unfinished)
                unfinished.rename(made)
        return made

    return cache(folder)


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, common: Callable[[str, Make], Folders]) -> Folders:
    """trained("gpt2") -> folder of the small model of that family, trained once and only if asked for.

    They outlive the run, in pytest's cache: the same source gives the same models.
    """
    if not hasattr(request.config, "cache"):  # -p no:cacheprovider
        return common("trained", families.train)
    source = inspect.getsource(families) + torch.__version__ + transformers.__version__
    kept = request.config.cache.mkdir("trained")
    return _once(kept, hashlib.sha256(source.encode()).hexdigest()[:16], families.train)


@pytest.fixture(scope="session")
def built(common: Callable[[str, Make], Folders]) -> Folders:
    """built("gpt2") -> folder of the small model of that family with random weights."""
    return common("built", families.build)


@pytest.fixture(scope="session")
def uneven(common: Callable[[str, Make], Folders]) -> Folders:
    """uneven("gpt2") -> folder of the small random model of that family with norms and biases that differ."""
    return common("uneven", families.build_uneven)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command calibrates or measures with more than a thousand tokens, whatever it says or leaves out."""
    from hfquant.compress import plan
    from hfquant.measure import verify

    def calibrated(source: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> Tensor:
        return token_batches(source, tokenizer, samples=min(samples, 16), seq_len=min(seq_len, 64), seed=seed)

    def measured(text: Text, tokenizer: PreTrainedTokenizerBase, window: int, windows: int | None) -> Tensor:
        return cut(text, tokenizer, min(window, 64), min(windows or 16, 16))

    monkeypatch.setattr(sys.modules[plan.__module__], "token_batches", calibrated)
    monkeypatch.setattr(verify, "cut", measured)
