"""What a finished compression tells of itself in its report: errors, bits and bytes of layers, size and accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import report
from ...errors import CheckpointError

COMPARABLE = {"sha256": "text", "feed": "what the models read", "selection": "choice of windows"}


def layers(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per compressed layer: stack, block and role, error, bits per weight, bytes before and after."""
    itemsize = _itemsize(known)
    rows = []
    for row in known.get("layers") or ():
        before, after = row.get("bytes_before"), row.get("bytes_after")
        if not isinstance(before, int) or not isinstance(after, int) or not before:
            continue
        stack, block, role = split(str(row["name"]).removesuffix(".weight"))
        rows.append(
            {
                "stack": stack,
                "block": block,
                "role": role,
                "error": row.get("error"),
                "bits": 8 * itemsize * after / before,
                "bytes_before": before,
                "bytes_after": after,
            }
        )
    return rows


def split(name: str) -> tuple[str, int | None, str]:
    """A module's name as (stack, block, role in the block); ("", None, name) for what is in no block.

    The block's number is the first of the name: stacks are outermost.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit() and i:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def _itemsize(known: Mapping[str, Any]) -> int:
    """Bytes of one weight of the original."""
    dtype = getattr(torch, str((known.get("source") or {}).get("dtype")), torch.bfloat16)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def frontier(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Size and accuracy of several results of one original, the original itself first.

    Raises CheckpointError for one that was not measured, and for results that were measured differently or come from
    different originals: their numbers do not belong into one figure.
    """
    known = {folder: report.read(folder) for folder in folders}
    first: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = []
    for folder, one in known.items():
        found = one.get("evaluation") or {}
        if found.get("reference_perplexity") is None or not (one.get("output") or {}).get("bytes"):
            raise CheckpointError(
                f"`{folder}` was not compared with its original", f"do it with `hfquant eval {folder} --against MODEL`"
            )
        settings = _settings(one)
        first = first or settings
        if different := [name for name in settings if settings[name] != first[name]]:
            raise CheckpointError(
                f"`{folder}` and `{folders[0]}` cannot be compared: they differ in {' and '.join(different)}",
                "measure both in the same way with `hfquant eval`",
            )
        rows += _rows(folder, one, whole=not rows)
    return rows


def _settings(known: Mapping[str, Any]) -> dict[str, Any]:
    found = known["evaluation"]
    settings = found.get("settings") or {}
    return {
        "original": (known.get("source") or {}).get("bytes"),
        "number of windows": found.get("windows"),
        "window length": found.get("window"),
        **{words: settings.get(name) for name, words in COMPARABLE.items()},
    }


def _rows(folder: Path, known: Mapping[str, Any], whole: bool) -> Iterator[dict[str, Any]]:
    found = known["evaluation"]
    if whole:
        size, ppl = known["source"]["bytes"], found["reference_perplexity"]
        yield {"name": "original", "bytes": size, "perplexity": ppl, "kl": 0.0}
    name = (known.get("recipe") or {}).get("name") or folder.name
    yield {"name": name, "bytes": known["output"]["bytes"], "perplexity": found["perplexity"], "kl": found["kl"]}


def best(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that no other row beats in both size and perplexity, by size."""
    found: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["bytes"], r["perplexity"])):
        if not found or row["perplexity"] < found[-1]["perplexity"]:
            found.append(row)
    return found
