"""How fast this machine moves and multiplies, measured in seconds and remembered."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from ... import storage
from ...machine import processor
from ...memory import trim
from .clock import undisturbed
from .pieces import room
from .reader import Handle, Reader
from .scratch import Scratch, write_all

SAMPLE = 128 << 20  # bytes moved per measurement of the disk
PART = 8 << 20
ROWS = 256  # tokens multiplied with a matrix: so many that its reading counts for little
COPIED = 32 << 20  # bytes copied at a time: measuring must fit into the budget that it is for
WEEK = 7 * 24 * 3600


@dataclass(frozen=True)
class Hardware:
    """Bytes per second of each way, and multiply-adds per second (x2) of products.

    disk_read: from the disk itself, past memory that the system keeps files in.  read_cpu: seconds of a processor per
    second of such reading.  matmul, matmul_half: in float32 and bfloat16, of many rows.
    attention: of a token over 1024 others.  to_device, from_device: to and from an accelerator, 0 without one.
    """

    processor: str
    cores: int
    memory: int
    disk_read: float
    disk_write: float
    read_cpu: float
    copy: float
    matmul: float
    matmul_half: float
    attention: float
    to_device: float
    from_device: float

    def lines(self) -> dict[str, str]:
        """For printing."""
        said = {
            "processor": f"{self.processor}, {self.cores} cores used",
            "memory": f"{self.memory / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB left",
            "disk": f"{self.disk_read / 1e9:.2f} GB/s read, {self.disk_write / 1e9:.2f} GB/s write",
            "memory copy": f"{self.copy / 1e9:.2f} GB/s",
            "matrix product": f"{self.matmul / 1e9:.0f} GFLOP/s (float32), {self.matmul_half / 1e9:.0f} (bfloat16)",
            "attention": f"{self.attention / 1e9:.0f} GFLOP/s",
        }
        if self.to_device:
            said["device"] = f"{self.to_device / 1e9:.1f} GB/s there, {self.from_device / 1e9:.1f} GB/s back"
        return said


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(folder: Path) -> Hardware:
    """Measure, with temporary files in `folder`; what one measurement took is free before the next."""
    written, read, cpu = _files(folder)
    trim()
    copied, there, back = _copies()
    single, half = _matmul(torch.float32), _matmul(torch.bfloat16)
    attention = _attention()
    trim()
    return Hardware(
        processor=processor(),
        cores=min(cores(), torch.get_num_threads() + 1),
        memory=psutil.virtual_memory().total,
        disk_read=SAMPLE / read,
        disk_write=SAMPLE / written,
        read_cpu=min(1.0, cpu / read),
        copy=copied,
        matmul=single,
        matmul_half=half,
        attention=attention,
        to_device=there,
        from_device=back,
    )


def _files(folder: Path) -> tuple[float, float, float]:
    """Seconds of writing a sample and of reading it, and seconds of a processor of that."""
    scratch = Scratch(folder)
    try:
        buffer = room(PART).random_(0, 256)
        file = scratch.file(SAMPLE)
        start = undisturbed()
        for at in range(0, SAMPLE, PART):
            write_all(file.fd, at, buffer.numpy().data)
        os.fsync(file.fd)
        written = undisturbed() - start
        if hasattr(os, "posix_fadvise"):  # where files cannot be read past memory, at least not from it
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return written, *_timed_read(file, buffer)
    finally:
        scratch.close()


def _copies() -> tuple[float, float, float]:
    """Bytes per second within memory, to an accelerator, and back."""
    source, target = room(COPIED).zero_(), room(COPIED).zero_()
    copied = COPIED / _best(lambda: target.copy_(source))
    return copied, *_device(source)


def _timed_read(file: Handle, buffer: torch.Tensor) -> tuple[float, float]:
    """Seconds, and seconds of processor, of a read as the loader does it."""
    reader = Reader(2)
    spent: list[tuple[float, float]] = []
    reader.spent = spent
    parts = [reader.fill(file, at, torch.uint8, buffer, "sample") for at in range(0, SAMPLE, PART)]
    for read in [read for part in parts for read in part]:
        read.result()
    reader.close()
    return sum(seconds for seconds, _ in spent) / reader.threads, sum(processor for _, processor in spent)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = undisturbed()
        work()
        times.append(undisturbed() - start)
    return min(times)


def _matmul(dtype: torch.dtype) -> float:
    x, W = torch.randn(ROWS, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    return 2 * ROWS * 1024 * 2048 / _best(lambda: torch.nn.functional.linear(x, W))


def _attention() -> float:
    """Eight sequences, eight heads of 64 channels: one new token each over 1024 others."""
    q, k = torch.randn(8, 8, 1, 64), torch.randn(8, 8, 1024, 64)
    return 4 * 8 * 8 * 1024 * 64 / _best(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))


def _device(source: torch.Tensor) -> tuple[float, float]:
    """Bytes per second to and from the first accelerator, from pinned memory."""
    if not torch.cuda.is_available():
        return 0.0, 0.0
    pinned, there = source.pin_memory(), source.cuda()

    def move(target: torch.Tensor, origin: torch.Tensor) -> None:
        target.copy_(origin, non_blocking=True)
        torch.cuda.synchronize()

    return len(source) / _best(lambda: move(there, pinned)), len(source) / _best(lambda: move(pinned, there))


def profile(folder: Path, fresh: bool = False) -> Hardware:
    """What was measured within the last week for this machine and this disk, or is now."""
    cache = storage.cache_folder() / "hardware.json"
    key = f"{platform.node()} {processor()} {cores()} {torch.get_num_threads()} {os.stat(folder).st_dev}"
    known = _remembered(cache)
    entry = known.get(key)
    if entry and not fresh and time.time() - entry["at"] < WEEK:
        return Hardware(**entry["measured"])
    found = measure(folder)
    known[key] = {"at": time.time(), "measured": asdict(found)}
    with suppress(OSError):  # a home that cannot be written: it is measured anew the next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=2))
        part.replace(cache)
    return found


def _remembered(cache: Path) -> dict[str, Any]:
    """What the file holds of measurements as this version makes them: another version's, or a torn file, count not."""
    try:
        known = json.loads(cache.read_text())
        names = {field.name for field in fields(Hardware)}
        return {key: entry for key, entry in known.items() if entry["measured"].keys() == names and entry["at"] >= 0}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
