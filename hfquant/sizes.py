"""How many bytes, as people read and write it."""

import re


def size(count: float) -> str:
    """163 MB, 1.27 GB: powers of ten, as disks and the Hub count them."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}" if count < 999.5 * step else f"{count / step:.0f} {unit}"
    return f"{count:.0f} B"


_STEP = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_STEP |= {f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)}


def read_size(text: str) -> int:
    """Bytes in `700MB`, `2GiB`, `1.5g` or `1000000`.  Raises ValueError on anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(found[1]) * _STEP[found[2]]) if found and found[2] in _STEP else 0
    if size <= 0:
        raise ValueError(f"cannot read `{text}` as a size; write 700MB or 2GiB")
    return size
