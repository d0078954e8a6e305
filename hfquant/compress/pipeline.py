"""The loop: block after block, each written down as soon as it is finished."""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ResourceError
from ..memory import give_back, map_large_pieces, settled
from ..model.blocks import weights
from ..model.source import Source
from ..tensors import formats
from ..tensors.encoding import Encoding
from ..tensors.formats import Wire
from .activations import Stream
from .blocksteps import in_scope, placed_steps, prepare, readings, ways
from .ends import compress_end
from .finish import finish
from .layout import LayerPlan
from .naming import carried_parts, named_parts
from .outputs import remembering
from .plan import Plan, clear, plan
from .result import LayerResult, record, row
from .rounding import Rounding
from .selection import stored_bytes
from .solve import Finished, Work
from .streaming import Passage, Streamer
from .student import finish_block

LARGE = 2 << 20  # bytes of a tensor that has memory of its own; for less, the system would take its share of the time


def compress(model: "str | Path | Source | Plan", *args: Any, **kwargs: Any) -> Iterator[LayerResult]:
    """Compress a model, yielding every layer as it is finished; afterwards `out` is a complete checkpoint.

    Takes a `Plan`, or the arguments of `plan`.  Stopped at any moment, the same call goes on where it was and ends
    in the same bytes.
    """
    todo = model if isinstance(model, Plan) else plan(model, *args, **kwargs)
    return _Run(todo).layers()


class _Run:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.journal, self.skeleton = plan, plan.journal, plan.skeleton
        self.block_steps, self.steps, self.final_steps = (
            in_scope(plan.recipe.steps, scope) for scope in ("block", "linear", "finished")
        )
        self.format = formats.load(plan.wire.format)
        self.index = {name: i for i, name in enumerate(n for stack in plan.stacks for n in stack.blocks)}
        self.rows: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        self.finished: set[str] = set()

    @torch.no_grad()
    def layers(self) -> Iterator[LayerResult]:
        start = time.perf_counter()
        map_large_pieces(LARGE)
        self.plan.out.mkdir(parents=True, exist_ok=True)
        if self.plan.fresh:
            clear(self.plan.out, self.journal)
        self.journal.begin(self.plan.fingerprint)
        entries = self.journal.entries()
        self.finished = {entry["block"] for entry in entries}
        self.rows = [row for entry in entries for row in entry["layers"]]
        self.sites = [{"block": e["block"], **site} for e in entries for site in e.get("sites", ())]
        with settled():
            yield from self._data_free() if self.plan.tokens is None else self._calibrated(self.plan.tokens)
            yield from self._ends()
        files = finish(self.plan, self._wire())
        before = sum(entry["seconds"] for entry in entries)
        seconds = before + time.perf_counter() - start
        record(self.plan, self.rows, self.sites, self.format.config(self._wire()), files, seconds, len(entries))
        self.journal.remove()

    def _data_free(self) -> Iterator[LayerResult]:
        for name in self.index:
            if name not in self.finished:
                yield from self._block(name, None, 0, None)

    def _calibrated(self, tokens: Tensor) -> Iterator[LayerResult]:
        streamer = Streamer(
            self.skeleton, tokens, self.journal.stream, self.plan.batch, self.plan.device, self.plan.crew
        )
        for passage in streamer.passages():
            yield from self._follow(streamer, passage)
        for name in self.index:  # blocks that text never reaches: a vision tower
            if name not in self.finished:
                yield from self._block(name, None, 0, None)

    def _follow(self, streamer: Streamer, passage: Passage) -> Iterator[LayerResult]:
        """All blocks of one stack, from the first that is not finished."""
        names = passage.stack.blocks
        begin = next((i for i, name in enumerate(names) if name not in self.finished), len(names))
        original = self._original(passage) if begin == 0 else None
        if begin:
            passage.stream = self._stored(passage, begin)
            if self._needs_original and begin < len(names):
                original = self._stored(passage, begin, "original")
        for i in range(begin, len(names)):
            yield from self._in_memory(streamer, names[i], passage, i, original)
            if original is not None:
                original = self._stored(passage, i + 1, "original")

    def _in_memory(
        self, streamer: Streamer, name: str, passage: Passage, i: int, original: Stream | None
    ) -> Iterator[LayerResult]:
        """A block, begun again with smaller batches when memory runs out.  What was told of it is not told again."""
        told: set[str] = set()
        while True:
            try:
                for result in self._block(name, passage, i, original):
                    if result.name not in told:
                        told.add(result.name)
                        yield result
                return
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
            self._shrink(streamer, passage)  # out here, where no traceback holds the tensors that were too many

    @property
    def _needs_original(self) -> bool:
        return any(getattr(step, "needs_original", False) for _, step in [*self.steps, *self.final_steps])

    def _original(self, passage: Passage) -> Stream | None:
        """The original model's hidden states before the first block: the same as everyone's."""
        if not self._needs_original:
            return None
        copy = self._at(passage, 0, "original")
        shutil.copyfile(passage.stream.path, copy.path)
        return copy

    def _at(self, passage: Passage, i: int, which: str = "stream") -> Stream:
        """Where the hidden states before block i of a stack lie."""
        path = self.journal.stream / f"{passage.stack.name}.{which}.{i:05d}"
        return Stream(path, passage.stream.samples, passage.stream.shape, passage.stream.dtype)

    def _stored(self, passage: Passage, i: int, which: str = "stream") -> Stream:
        stream = self._at(passage, i, which)
        if not stream.complete():
            raise CheckpointError(f"{stream.path} is missing or damaged", "start again with `--fresh`")
        return stream

    def _shrink(self, streamer: Streamer, passage: Passage) -> None:
        """Out of memory: go on with batches half as large."""
        if streamer.batch == 1:
            raise ResourceError(
                "out of memory with a single calibration sequence at a time",
                "use shorter ones (`--seq-len`); what is finished is kept, run the same command again",
            )
        self.skeleton.drop_module(passage.stack.blocks[0])
        passage.ahead = None
        streamer.shrink(passage)

    def _block(self, name: str, passage: Passage | None, i: int, original: Stream | None) -> Iterator[LayerResult]:
        begun = time.perf_counter()
        block = self.skeleton.load_module(name, torch.float32)
        targets = {w: self.plan.targets.get(f"{name}.{w.name}") for w in weights(block)}
        found = {w: target for w, target in targets.items() if target is not None}
        work = Work(
            {w: target.grid for w, target in found.items()}, placed_steps(self.steps, found),
            self.plan.wire.scale_dtype, readings=readings(found, self.plan.recipe),
            free=self.format.name == "native", room=self.plan.room, final_steps=self.final_steps, crew=self.plan.crew,
            ways=ways(found, self.plan.recipe),
        )  # fmt: skip
        masters, work, prepared = prepare(block, self.block_steps, work, passage, i, self.plan.dtype, self.plan.device)
        for p in block.parameters():
            p.data = p.data.to(self.plan.device, self.skeleton.dtype, copy=True)
        both = None
        if passage is not None and original is not None:
            both = (original, self._at(passage, i + 1, "original"))
        rows: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        with Rounding(block) as rounding, remembering(block, passage if self.plan.crew.parts == 1 else None):
            for done in finish_block(block, masters, work, prepared, passage, i, rounding, both, self.plan.dtype):
                layer = self.plan.layers[f"{name}.{done.weight.name}"]
                tensors |= named_parts(self.skeleton, self.format, layer.name, layer.kind, done.Q)
                result = self._result(layer, done)
                rows.append(row(result))
                yield result
            if passage is not None:
                self._advance(passage, block, i)
        tensors |= carried_parts(self.skeleton, name, prepared.changed)
        if both is not None:
            both[1].sync()
        self.skeleton.drop_module(name)
        self._finish_block(name, self.index[name], tensors, rows, time.perf_counter() - begun, prepared.rows)
        for stale in () if passage is None else (self._at(passage, i), self._at(passage, i, "original")):
            stale.delete()

    def _advance(self, passage: Passage, block: nn.Module, i: int) -> None:
        """What the next block will see."""
        passage.advance(block, i)
        passage.stream.sync()

    def _ends(self) -> Iterator[LayerResult]:
        """Embeddings and head, where the recipe compresses them."""
        layers = [layer for layer in self.plan.layers.values() if layer.block == len(self.index)]
        if not layers or "ends" in self.finished:
            return
        begun = time.perf_counter()
        rows: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            done = compress_end(self.skeleton, layer.name, layer.grid, self.plan.wire.scale_dtype)
            tensors |= named_parts(self.skeleton, self.format, layer.name, layer.kind, done.Q)
            result = self._result(layer, done)
            rows.append(row(result))
            yield result
        self._finish_block("ends", len(self.index), tensors, rows, time.perf_counter() - begun)

    def _finish_block(
        self,
        name: str,
        index: int,
        tensors: Mapping[str, Tensor],
        rows: list[dict[str, Any]],
        seconds: float,
        sites: list[dict[str, Any]] | None = None,
    ) -> None:
        self.journal.write_block(index, tensors)
        entry = {"block": name, "index": index, "layers": rows, "seconds": seconds, "sites": sites or []}
        self.journal.append(entry)
        self.finished.add(name)
        self.rows += rows
        self.sites += [{"block": name, **site} for site in sites or []]
        give_back()

    def _wire(self) -> Wire:
        """How the finished layers are stored."""
        found = {self.plan.targets[row["name"]].layer: row.get("encoding") for row in self.rows}
        return self.plan.wire.as_written({name: Encoding.parse(text) for name, text in found.items() if text})

    def _result(self, layer: LayerPlan, done: Finished) -> LayerResult:
        encoding, copies = self.format.keeps(done.Q.encoding), done.Q.shape[0] // layer.shape[0]
        after = stored_bytes(self.format, encoding, layer.shape, self.plan.wire.scale_dtype, copies)
        return LayerResult(
            name=layer.name, kind=layer.kind, shape=layer.shape, grid=layer.grid, method=done.method, error=done.error,
            bytes_before=layer.bytes_before, bytes_after=after, seconds=done.seconds, notes=done.notes,
            block=layer.block, blocks=self.plan.blocks, encoding=str(encoding), trail=done.trail,
        )  # fmt: skip


def _out_of_memory(error: Exception) -> bool:
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)
