"""Running a whole model with one block in memory.

The hidden states of all samples go through block 0, then through block 1, and so on; between blocks they lie on
disk.  What the model itself does before and after its blocks is done by its own code, with stubs in their place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..memory import give_back
from ..model.blocks import Stack, hidden, stacks
from ..model.inputs import model_inputs
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from .activations import Stream
from .calls import Calls, Reached, first_tensor, like, stubbed
from .crew import ALONE, Crew

if TYPE_CHECKING:
    from .outputs import Outputs
    from .shards import Shards

TOGETHER = 2048  # tokens
HELD_OUT = 8  # where blocks are trained, one batch in so many is kept for choosing the best step


def largest_batch(tokens: Tensor, recipe: Recipe, parts: int = 1) -> int:
    """How many sequences go through a block together.  tokens [samples, seq].  parts: that they are cut into."""
    samples, length = tokens.shape
    parts = max(parts, HELD_OUT if recipe.distills else 1)
    return max(1, min(samples // parts, TOGETHER // length))


@dataclass
class Passage:
    """One stack on its way: how its blocks are called, and the hidden states before the block that is next.

    crew: who works on the blocks.  shards: what they were given of the hidden states, see `shards.py`.
    now: the number of the latest call, the first of its samples and how many they are.  outputs: of the parts of the
    block at hand, where they are remembered.  ahead: the hidden states behind the block at hand, where a pass that was
    made anyway has them.
    """

    stack: Stack
    calls: Calls
    stream: Stream
    batches: list[tuple[int, int]]
    output: Any = None  # what its first block returned: the pattern for the stubs
    device: str = "cpu"
    now: tuple[int, int, int] = (0, 0, 0)
    outputs: "Outputs | None" = None
    crew: Crew = ALONE
    shards: "Shards | None" = None
    ahead: Stream | None = None

    def arguments(self, block: int, batch: int, stream: Stream | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call of one block for one batch, with the hidden state read from `stream` (the passage's by default)."""
        at, n = self.batches[batch]
        self.now = self.now[0] + 1, at, n
        return self.calls.arguments(block, batch, (stream or self.stream).read(at, n), self.device)

    def behind(self, block: int) -> Stream:
        """The file for the hidden states behind a block."""
        path = self.stream.path.with_name(f"{self.stack.name}.stream.{block + 1:05d}")
        return Stream(path, self.stream.samples, self.stream.shape, self.stream.dtype)

    def advance(self, module: nn.Module, block: int) -> None:
        """Move on to the hidden states behind a block: what it puts out now, unless `ahead` has them."""
        self.stream, self.ahead = self.ahead or self.run(module, block, self.behind(block).path), None

    def run(self, module: nn.Module, block: int, target: Path) -> Stream:
        """All batches through one block, into a new file."""
        out = Stream(target, self.stream.samples, self.stream.shape, self.stream.dtype)
        out.delete()
        for at, x in self._outputs(module, block):
            out.write(at, x)
        return out

    def _outputs(self, module: nn.Module, block: int) -> Iterator[tuple[int, Tensor]]:
        if self.crew.parts > 1:
            from .shards import advance

            yield from advance(module, self, block)
            return
        for batch, (at, _) in enumerate(self.batches):
            args, kwargs = self.arguments(block, batch)
            yield at, hidden(module(*args, **kwargs))


@dataclass
class Streamer:
    """Takes tokens [samples, seq] through the stacks of a skeleton, `batch` samples at a time."""

    skeleton: Skeleton
    tokens: Tensor
    folder: Path
    batch: int
    device: str = "cpu"
    crew: Crew = ALONE
    finished: dict[str, Passage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stacks = {stack.name: stack for stack in stacks(self.skeleton.model)}
        self._cut()
        blocks = [name + "." for stack in self.stacks.values() for name in stack.blocks]
        self.outside = [n for n in self.skeleton.stored if not n.startswith(tuple(blocks))]

    def _cut(self) -> None:
        """The first batch is a single sample: what is proven by running a block is run on that one, many times."""
        samples = self.tokens.shape[0]
        self.batches = [(0, 1)] + [(at, min(self.batch, samples - at)) for at in range(1, samples, self.batch)]

    @torch.no_grad()
    def shrink(self, passage: Passage) -> None:
        """Halve the batches, and record anew how the blocks of this passage are called with them."""
        self.batch = max(1, self.batch // 2)
        self._cut()
        passage.calls.delete()
        again = self._capture()
        assert again is not None
        if again.stream.path != passage.stream.path:
            again.stream.delete()
        passage.calls, passage.batches, passage.shards = again.calls, again.batches, None

    @torch.no_grad()
    def passages(self) -> Iterator[Passage]:
        """The stacks in the order in which the model runs them.

        The caller moves each passage's stream past its last block before asking for the next.  Stacks that text
        does not reach (a vision tower) are not yielded.
        """
        while (passage := self._capture()) is not None:
            yield passage
            self.finished[passage.stack.name] = passage

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """After all passages: the model's logits, batch by batch [n, seq, vocabulary]."""
        self.skeleton.load(self.outside)
        for at, n in self.batches:
            with stubbed(self.skeleton.model, self.replay(at, n), list(self.stacks.values())):
                yield self.call(at, n).logits
        self.skeleton.drop(self.outside)

    def _capture(self) -> Passage | None:
        """Record how the next stack is called; None if the model ends without reaching an unfinished one."""
        if len(self.finished) == len(self.stacks):
            return None
        self.skeleton.load(self.outside)
        found: Passage | None = None
        for at, n in self.batches:
            recording = _Recording(self, at, n, found)
            stubs = stubbed(self.skeleton.model, recording, list(self.stacks.values()))
            with stubs, self._without_head(), suppress(Reached):
                self.call(at, n)
            found = recording.passage
            if found is None:
                break
            found.calls.add(recording.calls)
        self.skeleton.drop(self.outside)
        give_back()
        return found

    @contextmanager
    def _without_head(self) -> Iterator[None]:
        """Within: the model is left before its head, whose logits are larger than everything else together."""

        def leave(*_: Any) -> None:
            raise Reached

        head = self.skeleton.model.get_output_embeddings()
        handle = None if head is None else head.register_forward_pre_hook(leave)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def begin(self, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passage:
        """A passage through the stack of that name, whose first block is about to be called with x."""
        stack = self.stacks[name]
        calls = Calls(self.folder / f"{name}.calls")
        calls.delete()  # what a killed run left
        stream = Stream(
            self.folder / f"{name}.stream.00000",
            self.tokens.shape[0],
            tuple(x.shape[1:]),
            self.skeleton.dtype,
        )
        first = self.skeleton.load_module(stack.blocks[0])
        output = type(first).forward(first, *args, **kwargs)
        self.skeleton.drop_module(stack.blocks[0])
        if hidden(output).shape != x.shape:
            raise SourceError(f"the blocks of {name} change the shape of the hidden state; hfquant cannot stream them")
        return Passage(stack, calls, stream, self.batches, output, self.device, crew=self.crew)

    def replay(self, at: int, n: int) -> Callable[[str, int, tuple[Any, ...], dict[str, Any]], Any]:
        """A stub for finished stacks: the last block returns the stored result, the others what they were given."""

        def stub(name: str, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            passage = self.finished[name]
            last = i == len(passage.stack.blocks) - 1
            return like(passage.output, passage.stream.read(at, n) if last else first_tensor(args, kwargs))

        return stub

    def call(self, at: int, n: int) -> Any:
        """Run the model on some samples, with whatever stands in its blocks' places."""
        inputs = model_inputs(self.skeleton.source.config, self.tokens[at : at + n])
        return self.skeleton.model(
            **{k: v.to(self.skeleton.dtype) if v.is_floating_point() else v for k, v in inputs.items()},
            use_cache=False,
        )


class _Recording:
    """The stub of one capturing run: notes every call of the stack being captured, then leaves the model."""

    def __init__(self, streamer: Streamer, at: int, n: int, passage: Passage | None) -> None:
        self.streamer, self.at, self.passage = streamer, at, passage
        self.replay = streamer.replay(at, n)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, name: str, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in self.streamer.finished:
            return self.replay(name, i, args, kwargs)
        x = first_tensor(args, kwargs)
        if self.passage is None:
            self.passage = self.streamer.begin(name, x, args, kwargs)
        self.calls.append((args, kwargs))
        if i == 0:
            self.passage.stream.write(self.at, x)
        if i == len(self.passage.stack.blocks) - 1:
            raise Reached
        return like(self.passage.output, x)
