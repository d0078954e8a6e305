"""The kernels compute what they should: run by triton's interpreter, which has to be asked for before they are loaded.

So each `check_*.py` beside this file is run by a pytest of its own, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

HERE = Path(__file__).parent
CHECKS = sorted(HERE.glob("check_*.py"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_kernels(check: Path) -> None:
    run(check, "not slow")


@pytest.mark.slow
def test_what_takes_long() -> None:
    run(HERE / "check_linear.py", "slow")


def run(check: Path, marked: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "HFQUANT_KERNELS": "exact"}
    # without conftest.py, which loads transformers
    options = [
        "-q",
        "-x",
        "--noconftest",
        "-p",
        "tests.poison",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-m",
        marked,
    ]
    command = [sys.executable, "-m", "pytest", *options, str(check)]
    root = HERE.parents[3]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
