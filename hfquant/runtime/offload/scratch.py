"""Temporary files that cannot be left behind: they have no name, so the system frees them however the process ends."""

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...errors import ResourceError, SourceError
from .reader import BLOCK, Handle


class Scratch:
    """Room on disk in the file system of `folder`, given back by `close` or with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else default_folder()
        self._open: list[Handle] = []

    def file(self, nbytes: int) -> Handle:
        """An open file with that much room behind it.  Raises ResourceError if the disk has not."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as opened:
                handle = Handle.of(os.dup(opened.fileno()))
        except OSError as error:
            raise self.refused(error, nbytes) from error
        self._open.append(handle)
        try:
            self.extend(handle, 0, nbytes)
        except ResourceError:
            self.release(handle)  # what there was room for
            raise
        return handle

    def extend(self, handle: Handle, at: int, nbytes: int) -> None:
        """Have room for so many bytes from `at` on.  Raises ResourceError if the disk has not."""
        try:
            if nbytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fd, at, nbytes)
        except OSError as error:
            raise self.refused(error, nbytes) from error

    def refused(self, error: OSError, nbytes: int) -> ResourceError:
        """What to say of a file that could not be made or written."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ResourceError(
                f"the disk of `{self.folder}` has no room for {nbytes / 1e6:,.0f} MB of temporary files",
                "free some space, or name another folder with `--disk DIR`",
            )
        return ResourceError(f"`{self.folder}` cannot hold temporary files: {error}", "name a folder with `--disk DIR`")

    def release(self, handle: Handle) -> None:
        """Give one file's room back."""
        if handle in self._open:
            self._open.remove(handle)
            handle.close()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


def default_folder() -> Path:
    """The system's for temporary files; one that outlives a restart where that is memory, not a disk."""
    usual, lasting = Path(tempfile.gettempdir()), Path("/var/tmp")
    return lasting if is_memory(usual) and lasting.is_dir() and not is_memory(lasting) else usual


def is_memory(folder: Path) -> bool:
    """Whether files of this folder lie in memory."""
    mounted = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    where = folder.resolve()
    return next((mounted[one] for one in (where, *where.parents) if one in mounted), "") in ("tmpfs", "ramfs")


@dataclass(frozen=True, order=True)
class Region:
    """So many bytes of a file from an offset on, a multiple of what direct reads ask for."""

    size: int
    offset: int


class Regions:
    """Room in one temporary file, taken and given back.

    A file for every tensor of a cache would be thousands, and a process may have about a thousand open.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch, self.end = scratch, 0
        self._file: Handle | None = None
        self._free: list[Region] = []

    @property
    def file(self) -> Handle:
        if self._file is None:
            self._file = self.scratch.file(0)
        return self._file

    def take(self, nbytes: int) -> Region:
        """The smallest that was given back and is large enough, else a new one.

        Raises ResourceError if the disk has no room.
        """
        fits = min((region for region in self._free if region.size >= nbytes), default=None)
        if fits is not None:
            self._free.remove(fits)
            return fits
        region = Region(-(-nbytes // BLOCK) * BLOCK, self.end)
        self.scratch.extend(self.file, region.offset, region.size)
        self.end += region.size
        return region

    def give(self, region: Region) -> None:
        """Let others have it."""
        self._free.append(region)

    def close(self) -> None:
        if self._file is not None:
            self.scratch.release(self._file)
        self._file, self.end = None, 0
        self._free.clear()


class Files:
    """Read access to files by path, opened once: one that is removed afterwards can still be read."""

    def __init__(self) -> None:
        self._open: dict[Path, Handle] = {}

    def handle(self, path: Path) -> Handle:
        if path not in self._open:
            try:
                self._open[path] = Handle.of(os.open(path, os.O_RDONLY), path)
            except OSError as error:
                raise SourceError(f"{path.name} cannot be read: {error}", "download the model again") from error
        return self._open[path]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Raises OSError."""
    done = 0
    while done < len(view):
        done += os.pwritev(fd, [view[done:]], offset + done)
