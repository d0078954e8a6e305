"""How many bytes, as people read it."""


def size(count: float) -> str:
    """163 MB, 1.27 GB: powers of ten, as disks and the Hub count them."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}" if count < 999.5 * step else f"{count / step:.0f} {unit}"
    return f"{count:.0f} B"
