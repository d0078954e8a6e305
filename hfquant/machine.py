"""What a measurement was made on: the machine, the libraries, and how much memory the process took."""

import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import __version__
from .memory import give_back

T = TypeVar("T")
_forgotten = [0]  # the highest peak that was reset: `peak_memory` still knows it
LIBRARIES = ("torch", "transformers", "safetensors", "huggingface-hub")


def peak_memory() -> int:
    """Bytes of physical memory this process had at most, since it started."""
    if (peak := _proc("self/status").get("VmHWM")) is not None:
        return max(peak, _forgotten[0])
    if sys.platform == "win32":
        return 0  # unknown: Windows tells it only through an API outside Python's library
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Footprint:
    """The memory that work takes from here on, on top of what the process has now."""

    def __init__(self) -> None:
        give_back()
        self.before = _proc("self/status").get("VmRSS")

    def of(self, work: Callable[[], T]) -> tuple[T, int | None]:
        """Do some work -> (its result, the most bytes in use while it went on); None where the system does not say.

        On a GPU: of its memory, everything that torch holds there.
        """
        if torch.cuda.is_available() and torch.cuda.memory_allocated():
            torch.cuda.reset_peak_memory_stats()
            return work(), torch.cuda.max_memory_allocated()
        resettable = _reset_peak()
        done = work()
        peak = _proc("self/status").get("VmHWM")
        return done, peak - self.before if resettable and peak and self.before else None


def _reset_peak() -> bool:
    """Have Linux forget the peak of this process so far."""
    _forgotten[0] = max(_forgotten[0], _proc("self/status").get("VmHWM", 0))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them torch takes several times as
    long as in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not say."""
    return _proc("meminfo").get("MemAvailable")


def resident_memory() -> int:
    """Bytes of physical memory this process has now, 0 where the system does not say."""
    return _proc("self/status").get("VmRSS", 0)


def most_memory() -> int | None:
    """Bytes that a process here can have at all: the machine's, or its container's; None where the system does not
    say."""
    files = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
    allowed = [file.read_text().strip() for file in files if file.is_file()]
    limits = [int(text) for text in allowed if text.isdigit()] + [_proc("meminfo").get("MemTotal", 0)]
    return min((limit for limit in limits if limit > 0), default=None)


def hardware() -> dict[str, Any]:
    """The machine, in words and numbers that may stand on a public card."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _proc("meminfo").get("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """hfquant, Python and the libraries that decide the numbers."""
    libraries = {name.replace("-", "_"): version(name) for name in LIBRARIES}
    return {"hfquant": __version__, "python": platform.python_version(), **libraries}


def processor() -> str:
    """Its name, as the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _proc(name: str) -> dict[str, int]:
    """The `key: value kB` lines of a file of Linux' /proc, in bytes; nothing on other systems."""
    path = Path("/proc") / name
    lines = path.read_text().splitlines() if path.is_file() else []
    found = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in found if words[-1:] == ["kB"]}
