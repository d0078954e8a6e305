"""How fast this machine moves and multiplies, measured in seconds and remembered."""

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ... import storage
from .pieces import room
from .scratch import Scratch, read_into, write_all

SAMPLE = 128 << 20  # bytes moved per measurement of the disk
CHUNK = 8 << 20
COPIED = 32 << 20  # bytes copied at a time: measuring must fit into the budget that it is for
WEEK = 7 * 24 * 3600


@dataclass(frozen=True)
class Hardware:
    """Bytes per second of each way, and multiply-adds per second (x2) of a float32 product.

    disk_read: from the disk itself; cached_read: of a file that memory holds.  read_cpu, cached_cpu: seconds of a
    processor per second of such reading.
    """

    processor: str
    cores: int
    memory: int
    disk_read: float
    disk_write: float
    cached_read: float
    read_cpu: float
    cached_cpu: float
    copy: float
    matmul: float

    def lines(self) -> dict[str, str]:
        """For printing."""
        return {
            "processor": f"{self.processor}, {self.cores} cores used",
            "memory": f"{self.memory / 1e9:.1f} GB",
            "disk": f"{self.disk_read / 1e9:.2f} GB/s read, {self.disk_write / 1e9:.2f} GB/s write",
            "cached files": f"{self.cached_read / 1e9:.2f} GB/s",
            "memory copy": f"{self.copy / 1e9:.2f} GB/s",
            "matrix product": f"{self.matmul / 1e9:.0f} GFLOP/s (float32)",
        }


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(folder: Path) -> Hardware:
    """Measure, with temporary files in `folder`."""
    scratch = Scratch(folder)
    try:
        buffer = room(2 * CHUNK)
        buffer.random_(0, 256)
        fd = scratch.file(SAMPLE)
        start = time.perf_counter()
        for at in range(0, SAMPLE, CHUNK):
            write_all(fd, at, _part(buffer, at))
        os.fsync(fd)
        written = time.perf_counter() - start
        cached, cached_cpu = _timed_read(fd, buffer)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cold, cold_cpu = _timed_read(fd, buffer)
    finally:
        scratch.close()
    source, target = room(COPIED).zero_(), room(COPIED).zero_()
    return Hardware(
        processor=_processor(),
        cores=min(cores(), torch.get_num_threads() + 1),
        memory=_total_memory(),
        disk_read=SAMPLE / cold,
        disk_write=SAMPLE / written,
        cached_read=SAMPLE / cached,
        read_cpu=min(1.0, cold_cpu / cold),
        cached_cpu=min(1.0, cached_cpu / cached),
        copy=COPIED / _best(lambda: target.copy_(source)),
        matmul=_matmul(),
    )


def _part(buffer: torch.Tensor, at: int) -> memoryview:
    """The room for what lies at `at`: the two halves of the buffer take turns."""
    start = at % len(buffer)
    return buffer.numpy().data[start : start + CHUNK]


def _timed_read(fd: int, buffer: torch.Tensor) -> tuple[float, float]:
    """Seconds, and seconds of processor, of a read as the loader does it."""
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(read_into, fd, at, _part(buffer, at), "sample") for at in range(0, SAMPLE, CHUNK)]
        for read in reads:
            read.result()
    return time.perf_counter() - start, time.process_time() - cpu


def _best(work: object) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return min(times)


def _matmul() -> float:
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    return 2 * 256 * 1024 * 1024 / _best(lambda: a @ b)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def profile(folder: Path, fresh: bool = False) -> Hardware:
    """What was measured within the last week for this machine and this disk, or is now."""
    cache = storage.cache_folder() / "hardware.json"
    key = f"{platform.node()} {_processor()} {cores()} {torch.get_num_threads()} {os.stat(folder).st_dev}"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    entry = known.get(key)
    if entry and not fresh and time.time() - entry["at"] < WEEK:
        return Hardware(**entry["measured"])
    found = measure(folder)
    known[key] = {"at": time.time(), "measured": asdict(found)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=2))
    part.replace(cache)
    return found
