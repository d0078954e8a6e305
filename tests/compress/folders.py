"""What a result folder holds, for comparing two of them."""

import hashlib
from pathlib import Path

# times, and how often the work was taken up again, differ between two runs that end in the same model
VOLATILE = {"report.json"}


def digests(folder: Path) -> dict[str, str]:
    """File name -> sha256 of everything that must be the same in two runs."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in VOLATILE
    }
