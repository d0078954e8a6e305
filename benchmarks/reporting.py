"""Where measurements go: JSON, and a table beside it where there is one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(out: Path, document: Mapping[str, Any], table: str | None = None) -> None:
    """`out`.json, and `out`.md with the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    if table is not None:
        out.with_suffix(".md").write_text(table)
