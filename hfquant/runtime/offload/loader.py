"""The weights of one stage at a time, read ahead of their use into a ring of buffers that never grows."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .pieces import Piece, aligned, footprint, room
from .reader import Reader
from .upload import Upload


@dataclass
class _Slot:
    """The buffer of one stage that is being read, or has been."""

    buffer: Tensor
    reads: list["Future[Any]"] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    copies: "tuple[dict[str, Tensor], Any] | None" = None  # on another device, and when they are there


class Loader:
    """Brings the weights of stages into the modules and takes them out again.

    stages: the pieces of each.  resident: names of those that stay in memory.  after: the stage that will follow
    one, as far as is known; a wrong guess costs time, nothing else.  upload: to another device, which then holds the
    resident pieces and two stages.  depth: how many stages are read ahead; memory
    holds `depth + 1` of them beside the resident pieces.  0 reads when needed.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Sequence[Piece]],
        resident: frozenset[str],
        after: Callable[[int], int],
        depth: int = 2,
        threads: int = 2,
        upload: Upload | None = None,
    ) -> None:
        self.model, self.stages, self.after, self.depth = model, stages, after, depth
        self.streamed = [[p for p in pieces if p.name not in resident] for pieces in stages]
        self.bytes_read, self.upload = 0, upload
        pinned = upload is not None and upload.cuda
        self._reader = Reader(threads)
        largest = max((footprint(pieces) for pieces in self.streamed), default=0)
        busy = sum(1 for pieces in self.streamed if pieces)
        self._free = [room(largest, pinned) for _ in range(min(depth + 1, busy))]
        self._slots: dict[int, _Slot] = {}
        self._empty: dict[str, nn.Parameter | None] = {}
        self._keep([p for pieces in stages for p in pieces if p.name in resident])

    def _keep(self, pieces: Sequence[Piece]) -> None:
        """Read what stays in memory, once."""
        for piece in pieces:
            slot = _Slot(room(aligned(piece.nbytes)))
            self._read([piece], slot)
            self._wait(slot)
            self._bind(slot)

    def enter(self, stage: int) -> None:
        """Have the weights of a stage in its modules.  Raises SourceError if they cannot be read."""
        if self.streamed[stage]:
            if stage not in self._slots:
                self._forget()
                self._submit(stage)
            try:
                self._wait(self._slots[stage])
            except BaseException:
                self._give_up(self._slots.pop(stage))  # half of it is there: the next use reads it anew
                raise
            self._bind(self._slots[stage])
        self._ahead(stage)
        following = self._slots.get(self.after(stage))
        if following is not None and all(read.done() and not read.exception() for read in following.reads):
            self._copy(following)

    def leave(self, stage: int) -> None:
        """Take them out again, and read on."""
        slot = self._slots.pop(stage, None)
        if slot is not None:
            for name in slot.tensors:
                module, leaf = _owner(self.model, name)
                module._parameters[leaf] = self._empty[name]
            self._give_up(slot)
        self._ahead(stage)

    def _ahead(self, stage: int) -> None:
        """Start reading the stages that come next, as far as there are buffers."""
        following = self.after(stage)
        for _ in range(min(self.depth, len(self.stages) - 1)):
            if not self._free:
                return
            if self.streamed[following] and following not in self._slots and following != stage:
                self._submit(following)
            following = self.after(following)

    def _submit(self, stage: int) -> None:
        slot = self._slots[stage] = _Slot(self._free.pop())
        self._read(self.streamed[stage], slot)

    def _read(self, pieces: Sequence[Piece], slot: _Slot) -> None:
        at = 0
        for piece in pieces:
            tensor = slot.tensors[piece.name] = piece.view(slot.buffer[at : at + piece.nbytes])
            slot.reads += self._reader.fill(piece.file, piece.offset, piece.stored, tensor.view(-1), piece.name)
            at += aligned(piece.nbytes)
            self.bytes_read += piece.size

    def try_out(self, stage: int) -> tuple[int, float, float]:
        """Read a stage into a free buffer and forget it.

        Returns bytes, seconds if nobody else used the machine, and seconds of a processor.
        """
        slot, spent = _Slot(self._free.pop()), []  # type: tuple[_Slot, list[tuple[float, float]]]
        self._reader.spent = spent
        try:
            self._read(self.streamed[stage], slot)
            self._wait(slot)
        finally:
            self._reader.spent = None
            self._give_up(slot)
        seconds, processor = (sum(part) for part in zip(*spent, strict=True))
        nbytes = sum(piece.size for piece in self.streamed[stage])
        return nbytes, seconds / min(self._reader.threads, len(spent)), processor

    def _wait(self, slot: _Slot) -> None:
        """Until all is read.  Raises what a read raised, every time: a slot that failed is never whole."""
        for read in slot.reads:
            read.result()

    def _give_up(self, slot: _Slot) -> None:
        """Take back the buffer of a slot, when nothing writes into it any more."""
        wait(slot.reads)
        if self.upload is not None and slot.copies is not None:
            self.upload.settle(slot.copies[1])
        self._free.append(slot.buffer)

    def _copy(self, slot: _Slot) -> dict[str, Tensor]:
        """The tensors where they are computed with."""
        if self.upload is None:
            return slot.tensors
        if slot.copies is None:
            self._wait(slot)
            slot.copies = self.upload.start(slot.tensors)
        return slot.copies[0]

    def _bind(self, slot: _Slot) -> None:
        tensors = self._copy(slot)
        if self.upload is not None and slot.copies is not None:
            self.upload.finish(*slot.copies)
        for name, tensor in tensors.items():
            module, leaf = _owner(self.model, name)
            self._empty.setdefault(name, module._parameters[leaf])
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _forget(self) -> None:
        """Give up what was read ahead in vain."""
        while self._slots:
            self._give_up(self._slots.popitem()[1])

    def close(self) -> None:
        """Stop reading and take every weight out."""
        self._reader.close()
        for name, empty in self._empty.items():
            module, leaf = _owner(self.model, name)
            module._parameters[leaf] = empty
        self._slots.clear()
        self._free.clear()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def total(pieces: Sequence[Sequence[Piece]]) -> int:
    """Bytes of all weights."""
    return sum(footprint(stage) for stage in pieces)
