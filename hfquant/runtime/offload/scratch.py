"""Temporary files that cannot be left behind: they have no name, so the system frees them however the process ends."""

import errno
import os
import tempfile
from pathlib import Path

from ...errors import ResourceError, SourceError


class Scratch:
    """Room on disk in the file system of `folder`, given back by `close` or with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else Path(tempfile.gettempdir())
        self._open: list[int] = []

    def file(self, nbytes: int) -> int:
        """A file descriptor with that much room behind it.  Raises ResourceError if the disk has not."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as opened:
                fd = os.dup(opened.fileno())
            self._open.append(fd)
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            raise self.refused(error, nbytes) from error
        return fd

    def refused(self, error: OSError, nbytes: int) -> ResourceError:
        """What to say of a file that could not be made or written."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ResourceError(
                f"the disk of `{self.folder}` has no room for {nbytes / 1e6:,.0f} MB of temporary files",
                "free some space, or name another folder with `--disk DIR`",
            )
        return ResourceError(f"`{self.folder}` cannot hold temporary files: {error}", "name a folder with `--disk DIR`")

    def release(self, fd: int) -> None:
        """Give one file's room back."""
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())


class Files:
    """Read access to files by path, opened once: one that is removed afterwards can still be read."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def fd(self, path: Path) -> int:
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise SourceError(f"{path.name} cannot be read: {error}", "download the model again") from error
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def read_into(fd: int, offset: int, view: memoryview, name: str) -> None:
    """Fill `view` from the file; other threads run meanwhile.  Raises SourceError if the file ends early."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error}", "check the disk") from error
        if not got:
            raise SourceError(f"the file of {name} ended early", "it was truncated while it was in use: restore it")
        done += got


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Raises OSError."""
    done = 0
    while done < len(view):
        done += os.pwritev(fd, [view[done:]], offset + done)
