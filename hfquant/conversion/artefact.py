"""What of a checkpoint's folder is published: its files, each with size and hashes, and where they came from."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import report
from ..errors import CheckpointError, QualityError
from ..measure import card
from .provenance import FILE as PROVENANCE
from .provenance import provenance

SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[\w.-]{20,}")
TEXT = (".json", ".md", ".txt", ".jinja", ".yaml")
TITLE = re.compile(r"[\w./-]{1,100}", re.ASCII)
PIECE = 1 << 20


@dataclass(frozen=True)
class File:
    """A file to publish.  `content` is a path on this disk, or the bytes themselves."""

    path: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """The name that git gives to a file that is stored in it as it is."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def pieces(self) -> Iterable[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as opened:
            while piece := opened.read(PIECE):
                yield piece


@dataclass(frozen=True)
class Artefact:
    """A checkpoint as it is published: `report` and `provenance` are in `files` too."""

    files: tuple[File, ...]
    report: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        """The original's name as it may stand in a title; foreign text stays within its line."""
        named = card.display_name(self.report)
        return named if TITLE.fullmatch(named) else "a model"


def read(folder: Path, *, force: bool = False) -> Artefact:
    """The artefact in a folder that `compress` or `eval` completed; nothing is written.

    force: also one that was not measured, or did not pass its gate.  Raises CheckpointError for a folder that is not
    a finished checkpoint or that holds an access token, QualityError for one that is not good enough.
    """
    known = report.read(folder)
    output = known.get("output") or {}
    if not (folder / "config.json").is_file() or not output.get("files"):
        raise CheckpointError(
            f"`{folder}` is not a finished checkpoint: it has no report of what it holds",
            "give the folder of `hfquant compress --out`, or measure another one first with `hfquant eval`",
        )
    if not force:
        _check_quality(folder, known)
    shown = report.public(known)
    files = [*_files(folder, {*output["files"], *_pictures(known)}), File(report.FILE, as_json(shown))]
    files.sort(key=lambda file: file.path)
    origin = provenance(shown, {file.path: (file.size, file.sha256) for file in files})
    files.append(File(PROVENANCE, as_json(origin)))
    for file in files:
        _refuse_secrets(file)
    return Artefact(tuple(files), shown, origin)


def _check_quality(folder: Path, known: Mapping[str, Any]) -> None:
    if not known.get("evaluation"):
        raise QualityError(
            f"`{folder}` was never measured", f"measure it with `hfquant eval {folder}`, or use `--force`"
        )
    if (known.get("gate") or {}).get("passed") is False:
        failures = "\n".join(f"- {failure}" for failure in known["gate"].get("broken") or ())
        raise QualityError(
            f"`{folder}` did not pass its quality gate:\n{failures}", "compress with more bits, or use `--force`"
        )


def _pictures(known: Mapping[str, Any]) -> set[str]:
    """The figures of a diagnosis, and the data behind them."""
    figures = known.get("figures") or {}
    return {str(name) for name in (figures.get("data"), *(f.get("file") for f in figures.get("files") or ())) if name}


def _files(folder: Path, names: Iterable[str]) -> list[File]:
    """The files that the report names, and the card."""
    found = []
    for name in sorted({*names, card.FILE} - {report.FILE, PROVENANCE}):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise CheckpointError(f"`{folder}` lacks {name}, which its report names", "compress again, with `--fresh`")
        found.append(File(Path(name).as_posix(), path))
    return found


def _refuse_secrets(file: File) -> None:
    """An access token in a text would be public the moment it is pushed."""
    if file.path.endswith(TEXT) and SECRET.search(b"".join(file.pieces())):
        raise CheckpointError(
            f"{file.path} holds what looks like an access token of the Hub", "remove it there, and revoke that token"
        )


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document as it is published."""
    return (json.dumps(report.plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
