"""Other people's programs as witnesses, each in an environment of its own, made when a test first asks for it.

They lie in `HFQUANT_WITNESSES`, by default in the user's cache, and are used again: XDG_CACHE_HOME is another one in
every run of the tests.  `HFQUANT_WITNESS_<NAME>` names an interpreter that is there already.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("HFQUANT_WITNESSES", "~/.cache/hfquant-witnesses")).expanduser()
PIP = ("pip", "install", "--quiet", "--disable-pip-version-check")


def python(name: str, *steps: tuple[str, ...]) -> Path:
    """An interpreter with packages: one `pip install` for each of `steps`."""
    if given := os.environ.get(f"HFQUANT_WITNESS_{name.upper()}"):
        return Path(given)
    folder = CACHE / name
    program = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.is_file() or stamp.read_text() != repr(steps):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for step in steps:
            subprocess.run([str(program), "-m", *PIP, *step], check=True)
        stamp.write_text(repr(steps))
    return program


@cache
def ours(root: Path) -> Path:
    """An interpreter with hfquant as a user installs it, built anew from the sources in `root`.

    With the package that cards name for those who load such models by transformers' own `from_pretrained`.
    """
    versions = ("-c", str(root / "constraints.txt"))
    program = python("clean", ("torch==2.13.0",), (*versions, str(root), "compressed-tensors>=0.15"))
    subprocess.run([str(program), "-m", *PIP, "--force-reinstall", "--no-deps", str(root)], check=True)
    return program


def node(package: str) -> Path:
    """A folder in which node finds a package."""
    folder = CACHE / "node"
    if not (folder / "node_modules" / package.rpartition("@")[0]).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"type": "module"}\n')
        subprocess.run(["npm", "install", "--silent", "--prefix", str(folder), package], check=True)
    return folder
