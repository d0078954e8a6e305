"""What is already done, on disk: a crash costs at most the block that was being worked on.

`<out>/.hfquant/` holds plan.json (what the work is), journal.jsonl (a line per finished block), blocks/ (its packed
tensors) and stream/ (the hidden states after it).  A block counts from the moment its line is complete; everything
the line speaks of is on disk before.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..tensors.shards import ShardWriter, sync, write_text

WORK = ".hfquant"


class Journal:
    """The working folder of one compression."""

    def __init__(self, out: Path) -> None:
        self.folder = out / WORK
        self.blocks, self.stream = self.folder / "blocks", self.folder / "stream"
        self.source = self.folder / "source"
        self._plan, self._lines = self.folder / "plan.json", self.folder / "journal.jsonl"
        self._moved = self.folder / "moved.json"

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """While a run is checked: if it is refused, a source that was unpacked for it goes again."""
        there = [folder for folder in (self.folder.parent, self.folder, self.source) if folder.exists()]
        try:
            yield
        except BaseException:
            if self.source not in there:
                shutil.rmtree(self.source, ignore_errors=True)
            for folder in (self.folder, self.folder.parent):
                if folder not in there and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise

    def plan(self) -> dict[str, Any] | None:
        """What the folder was begun with, None if nothing was begun."""
        if not self._plan.is_file():
            return None
        found: dict[str, Any] = json.loads(self._plan.read_text())
        return found

    def begin(self, plan: Mapping[str, Any]) -> None:
        for folder in (self.folder, self.blocks, self.stream):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self._plan, json.dumps(plan, indent=1))

    def entries(self) -> list[dict[str, Any]]:
        """The finished blocks, in order.  A line that was being written when the process died is not one."""
        if not self._lines.is_file():
            return []
        found = []
        for line in self._lines.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{self._lines} is damaged at line {len(found) + 1}", "start again with `--fresh`"
                ) from error
        return found

    def append(self, entry: Mapping[str, Any]) -> None:
        """Declare a block finished."""
        self._cut_torn_line()
        with self._lines.open("ab") as file:
            file.write(json.dumps(dict(entry)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)

    def _cut_torn_line(self) -> None:
        """Remove what a killed process left of its last line."""
        if self._lines.is_file():
            whole = self._lines.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end != len(whole):
                os.truncate(self._lines, end)

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        with ShardWriter(self.block_file(index), {n: (t.shape, t.dtype) for n, t in tensors.items()}) as writer:
            for name, tensor in tensors.items():
                writer.put(name, tensor)

    def block_file(self, index: int) -> Path:
        return self.blocks / f"{index:05d}.safetensors"

    def move(self, names: list[str]) -> None:
        """Declare which files of the result are about to be moved into `out`."""
        write_text(self._moved, json.dumps(names))

    def moved(self) -> list[str]:
        """The files of a result that may lie in `out` already."""
        found: list[str] = json.loads(self._moved.read_text()) if self._moved.is_file() else []
        return found

    def remove(self) -> None:
        """Forget the work.  What says that blocks are finished goes first: a kill in between must not leave claims."""
        self.forget()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """Declare nothing finished; an unpacked source stays."""
        for file in (self._lines, self._plan, self._moved):
            file.unlink(missing_ok=True)
        if self.folder.is_dir():
            sync(self.folder)
        for folder in (self.blocks, self.stream):
            shutil.rmtree(folder, ignore_errors=True)
