"""Which of the instructions that the generators know this machine has."""

import platform
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Level:
    """A set of instructions.

    vector: bytes in a register.  dot: how 4 bytes by 4 bytes are summed into an int32: `vnni` in one instruction,
    `madd` in 16-bit steps, `emulated` in plain arithmetic (the code of `vnni` on a machine without it).  needs:
    LLVM's names of the features without which it cannot run.
    """

    name: str
    cpu: str
    features: str
    vector: int
    dot: str
    needs: tuple[str, ...]

    @property
    def lanes(self) -> int:
        """Rows of a weight in a register."""
        return self.vector // 4


_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni")
LEVELS = (
    Level("avx512vnni", "x86-64-v4", "+avx512vnni", 64, "vnni", _AVX512),
    Level("avxvnni", "x86-64-v3", "+avxvnni", 32, "vnni", (*_AVX2, "avxvnni")),
    Level("avx2", "x86-64-v3", "", 32, "madd", _AVX2),
)


@cache
def level() -> Level | None:
    """The best level that runs here; None if there is none.  Raises ImportError without llvmlite."""
    import llvmlite.binding as llvm

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    found = llvm.get_host_cpu_features()
    return next((level for level in LEVELS if all(found.get(name) for name in level.needs)), None)
