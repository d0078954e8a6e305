"""What a measurement was made on: the machine, the libraries, and how much memory the process took."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import __version__

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface-hub")


def peak_memory() -> int:
    """Bytes of physical memory this process had at most, since it started."""
    if (peak := _proc("self/status").get("VmHWM")) is not None:
        return peak
    if sys.platform == "win32":
        return 0  # unknown: Windows tells it only through an API outside Python's library
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes that can be had without swapping, None where the system does not say."""
    return _proc("meminfo").get("MemAvailable")


def hardware() -> dict[str, Any]:
    """The machine, in words and numbers that may stand on a public card."""
    found: dict[str, Any] = {
        "processor": _processor(),
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


def _processor() -> str:
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
