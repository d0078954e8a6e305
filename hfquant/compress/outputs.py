"""What finished parts of a block return, on disk: the passes that follow need not compute it again.

Where layers are observed one behind the other, a block runs several times over the same inputs, up to the layer at
hand.  All that completes before that layer is reached has its final weights, so it will return the same in every later
pass.  A part is remembered as a whole (an attention, once all its layers are finished) or by its layers.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model.blocks import Weight, weights
from .activations import Stream
from .calls import like
from .streaming import Passage


class Outputs:
    """The remembered outputs of one block's parts, for the hidden states of one passage."""

    def __init__(self, block: nn.Module, passage: Passage) -> None:
        self.block, self.passage = block, passage
        self._weights = {weight.module for weight in weights(block)}
        self._streams: dict[str, Stream] = {}
        self._patterns: dict[str, Any] = {}
        self._written: dict[str, dict[int, int]] = {}  # part -> first sample of a batch -> the call that wrote it
        self._refused: set[str] = set()
        self._patched: dict[str, Any] = {}

    def keep(self, pending: Collection[Weight]) -> None:
        """From here on remember every part that completes and holds none of these weights."""
        if next(self.block.parameters()).device.type != "cpu":
            return  # an accelerator computes faster than the disk reads
        unfinished = {weight.module for weight in pending}
        for name in self._outermost(unfinished):
            if name not in self._patched:
                self._patch(name)
        for name in [n for n in self._streams if any(self._complete(outer) for outer in _outer(n))]:
            self._forget(name)  # its outputs are inside of what is remembered as a whole

    def _outermost(self, unfinished: set[str]) -> list[str]:
        """Parts with finished weights only, none inside another."""
        found: list[str] = []
        for name, _ in self.block.named_modules():
            inside = [w for w in self._weights if _within(w, name)]
            usable = name and inside and name not in self._refused and unfinished.isdisjoint(inside)
            if usable and not any(_within(name, outer) for outer in found):
                found.append(name)
        return found

    def _patch(self, name: str) -> None:
        module = self.block.get_submodule(name)
        forward = module.forward
        self._patched[name] = module.__dict__.get("forward")
        module.forward = lambda *args, **kwargs: self._call(name, forward, args, kwargs)

    def _call(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, at, n = self.passage.now
        written = self._written.setdefault(name, {})
        if name in self._refused or written.get(at) == call:  # one that runs twice in a block returns two things
            self._refuse(name)
            return forward(*args, **kwargs)
        if at in written:
            return like(self._patterns[name], self._streams[name].read(at, n))
        output = forward(*args, **kwargs)
        x = _single(output)
        if x is None or x.shape[:1] != (n,):
            self._refuse(name)
        else:
            if name not in self._streams:
                path = self.passage.stream.path
                path = path.with_name(f"{path.name}.{name}.outputs")
                self._streams[name] = Stream(path, self.passage.stream.samples, tuple(x.shape[1:]), x.dtype)
                self._patterns[name] = like(output, x.new_empty(0))
            self._streams[name].write(at, x)
            written[at] = call
        return output

    def _complete(self, name: str) -> bool:
        return name in self._streams and len(self._written[name]) == len(self.passage.batches)

    def _refuse(self, name: str) -> None:
        self._refused.add(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if name in self._streams:
            self._streams.pop(name).delete()
            self._written.pop(name)

    def close(self) -> None:
        """Everything as it was, nothing left on disk.  What is closed twice stays closed."""
        for name, before in self._patched.items():
            module = self.block.get_submodule(name)
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._patched.clear()
        for name in list(self._streams):
            self._forget(name)


@contextmanager
def remembering(block: nn.Module, passage: Passage | None) -> Iterator[None]:
    """Within: passes over a passage's hidden states may remember what finished parts of the block return."""
    if passage is None:
        yield
        return
    outputs = passage.outputs = Outputs(block, passage)
    try:
        yield
    finally:
        outputs.close()
        passage.outputs = None


def _single(output: Any) -> Tensor | None:
    """The tensor, where that is all a part returns."""
    if isinstance(output, tuple | list) and all(rest is None for rest in output[1:]):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _outer(name: str) -> Iterator[str]:
    """The names of all that a part is inside of."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
