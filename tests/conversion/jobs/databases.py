"""A real PostgreSQL, where its programs are installed: a cluster of its own in a folder, gone when the tests end."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, None where there are none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _owner() -> str | None:
    """PostgreSQL refuses to be run by root."""
    return "postgres" if os.getuid() == 0 else None


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, user=_owner(), capture_output=True, cwd="/", timeout=120)


@contextmanager
def postgres() -> Iterator[str]:
    """A server that is reached by a socket in its folder alone -> the URL of an empty database."""
    binaries = programs()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="hfquant-postgres-"))  # a short path: sockets' names are short
    if (owner := _owner()) is not None:
        shutil.chown(folder, owner)
    data = folder / "data"
    quick = "-c fsync=off -c full_page_writes=off -c listen_addresses='' -c max_connections=200"
    try:
        _run([str(binaries / "initdb"), "-D", str(data), "-U", "hfquant", "--auth=trust", "--no-sync"])
        start = [str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
        _run([*start, "-o", f"{quick} -k {folder}", "start"])
        try:
            yield f"postgresql://hfquant@/postgres?host={folder}"
        finally:
            _run([str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
