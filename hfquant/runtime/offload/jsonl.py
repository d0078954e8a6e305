"""A file of prompts in, a file of answers out; what is finished survives whatever happens.

Answers are appended to `OUT.part` as they come.  When all are there, `OUT` is written in the order of the prompts, at
once, and the part is removed.  A rerun with the same prompts and settings goes on where the last one stopped.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ResourceError, SourceError

HEADER = "hfquant_batch"
VERSION = 2  # of the lines of a part


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, each an object with a text `prompt`.  Raises SourceError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # only these end a line: texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"`{path}` cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SourceError(f"line {number} of `{path}` is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise SourceError(f"line {number} of `{path}` has no text under `prompt`", 'write {"prompt": "..."}')
        found.append(entry)
    if not found:
        raise SourceError(f"`{path}` holds no prompts", 'write one {"prompt": "..."} a line')
    return found


class Answers:
    """The answers to a file of prompts, on their way to `out`."""

    def __init__(self, out: Path, prompts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        self.out, self.prompts = out, prompts
        self.part = out.with_name(out.name + ".part")
        text = json.dumps([VERSION, settings, [p["prompt"] for p in prompts]], sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.done: dict[int, dict[str, Any]] = {}
        self._resume()

    def _resume(self) -> None:
        """Read what an earlier run finished; what it was writing when it was killed is cut off."""
        try:
            raw = self.part.read_bytes() if self.part.is_file() else b""
            lines, size = _whole_lines(raw)
            if lines and lines[0].get(HEADER) != self.key:
                raise CheckpointError(
                    f"`{self.part}` belongs to other prompts or settings",
                    "repeat the command that wrote it, or delete it",
                )
            self.done = {line["index"]: line["answer"] for line in lines[1:]}
            if lines:
                os.truncate(self.part, size)
                return
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._write(json.dumps({HEADER: self.key}), "w")

    @property
    def missing(self) -> list[int]:
        return [i for i in range(len(self.prompts)) if i not in self.done]

    def add(self, index: int, completion: str, tokens: int) -> None:
        """One answer.  Raises ResourceError if the disk is full."""
        answer = {"index": index, "tokens": tokens, **self.prompts[index], "completion": completion}
        self._write(json.dumps({"index": index, "answer": answer}, ensure_ascii=False), "a")
        self.done[index] = answer

    def finish(self) -> None:
        """Write `out` in order, and remove the part."""
        ready = self.out.with_name(f"{self.out.name}.{os.getpid()}.tmp")
        try:
            with ready.open("w", encoding="utf-8") as file:
                for index in range(len(self.prompts)):
                    file.write(json.dumps(self.done[index], ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            ready.replace(self.out)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            ready.unlink(missing_ok=True)
        self.part.unlink()

    def _write(self, line: str, mode: str) -> None:
        try:
            with self.part.open(mode, encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> ResourceError:
        kept = f"; {len(self.done)} of {len(self.prompts)} answers are kept in `{self.part}`" if self.done else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return ResourceError(
            f"`{self.out}` cannot be written: {error.strerror}{kept}",
            "free some space, then repeat the command" if full else "name another file with `--output`",
        )


def _whole_lines(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """What was written whole, and how many bytes that is: after a power cut there may be anything behind it."""
    found: list[dict[str, Any]] = []
    size = 0
    for line in raw.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        found.append(entry)
        size += len(line)
    return found, size
