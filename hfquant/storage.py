"""Where hfquant keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`hfquant` in the user's folder for caches; it need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hfquant"
