"""One pass forward and one back, block by block: how far an error in a layer's output moves the model's predictions.

Forward, the hidden states before every block stay on disk.  At the end a token is drawn from what the model predicts
at every place; the gradient of its log-probability is taken back, from the last block to the first, each being run
again.  In memory there is one block, as in a compression; what grows with depth is on disk.

With labels drawn from the model itself, the mean of these gradients' squares is the Fisher matrix, which is the second
derivative of the KL divergence from the original: KL ≈ ½ E(gᵀδ)², whatever the text.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.activations import Stream
from ..compress.calls import Reached, first_tensor, like, stubbed
from ..compress.streaming import Passage, Streamer
from ..memory import give_back
from ..model.blocks import hidden
from ..model.skeleton import Skeleton

TOGETHER = 512  # tokens whose logits are in memory together
ROWS = 128  # of them, that are in float32

See = Callable[[str, nn.Module, "Backward"], None]


@dataclass
class Walk:
    """What the pass forward leaves: each stack's passage, and the hidden states before each of its blocks."""

    streamer: Streamer
    passages: list[Passage] = field(default_factory=list)
    before: list[list[Stream]] = field(default_factory=list)


@dataclass
class Backward:
    """A block on the way back."""

    walk: Walk
    stack: int
    index: int
    block: nn.Module
    after: Stream  # gradients of what the block puts out
    into: Stream  # of what it reads
    beside: dict[str, Stream]  # of what else it reads that earlier stacks have put out

    @torch.no_grad()
    def look(self) -> None:
        """All batches through the block."""
        passage = self.walk.passages[self.stack]
        for batch in range(len(passage.batches)):
            args, kwargs = passage.arguments(self.index, batch, self.walk.before[self.stack][self.index])
            self.block(*args, **kwargs)

    def run(self, begin: Callable[[int], None], *, last: bool = True) -> None:
        """All batches through the block and back.  begin(n): called before each, of n samples.  last: whether the
        gradients of what the block reads are written."""
        passage = self.walk.passages[self.stack]
        for batch, (at, n) in enumerate(passage.batches):
            begin(n)
            args, kwargs = passage.arguments(self.index, batch, self.walk.before[self.stack][self.index])
            x = first_tensor(args, kwargs).requires_grad_()
            others: dict[str, Tensor] = {}
            if self.stack:
                args, kwargs = _leaves((args, kwargs), x, others)
            with torch.enable_grad():
                y = hidden(self.block(*args, **kwargs))
            y.backward(self.after.read(at, n).to(y.device, y.dtype))
            if last:
                assert x.grad is not None
                self.into.write(at, x.grad)
                self._beside(at, n, others)

    def _beside(self, at: int, n: int, others: dict[str, Tensor]) -> None:
        for path, leaf in others.items():
            if leaf.grad is None or leaf.shape[0] != n:
                continue
            stream = self.beside.get(path)
            if stream is None:
                name = f"{self.into.path.name}.beside.{len(self.beside)}"
                shape = tuple(leaf.shape[1:])
                stream = Stream(self.into.path.with_name(name), self.into.samples, shape, torch.float32)
                self.beside[path] = stream
            known = stream.path.exists() and stream.path.stat().st_size >= (at + n) * stream.nbytes // stream.samples
            stream.write(at, leaf.grad.float().cpu() + stream.read(at, n) if known else leaf.grad)


def _leaves(tree: Any, x: Tensor, found: dict[str, Tensor], path: str = "") -> Any:
    """A call with its floating tensors but x as leaves that gather gradients, in `found` by their places."""
    if isinstance(tree, tuple | list):
        return type(tree)(_leaves(item, x, found, f"{path}/{i}") for i, item in enumerate(tree))
    if isinstance(tree, dict):
        return {name: _leaves(item, x, found, f"{path}/{name}") for name, item in tree.items()}
    if not isinstance(tree, Tensor) or tree is x or not tree.is_floating_point():
        return tree
    found[path] = tree.detach().requires_grad_()
    return found[path]


@torch.no_grad()
def forward(skeleton: Skeleton, tokens: Tensor, folder: Path, device: str = "cpu") -> Walk:
    """Run the model on tokens [samples, seq], and keep the hidden states before every block in `folder`."""
    walk = Walk(Streamer(skeleton, tokens, folder, max(1, TOGETHER // tokens.shape[1]), device))
    for passage in walk.streamer.passages():
        states = [passage.stream]
        for i, name in enumerate(passage.stack.blocks):
            block = on(skeleton.load_module(name), device)
            passage.stream = passage.run(block, i, folder / f"{passage.stack.name}.kept.{i + 1:05d}")
            states.append(passage.stream)
            skeleton.drop_module(name)
            give_back()
        walk.passages.append(passage)
        walk.before.append(states)
    return walk


def on(block: nn.Module, device: str) -> nn.Module:
    """The block on that device."""
    if device != "cpu":
        for p in block.parameters():
            p.data = p.data.to(device)
    return block


class Ends:
    """What is told of the ends of the model on the way back; does nothing itself."""

    def head(self, module: nn.Module, h: Tensor, gradient: Tensor) -> None:
        """A batch's inputs of the output head [n, seq, in], and the gradients of its outputs [n, seq, vocabulary]."""

    def embedded(self, module: nn.Module, ids: Tensor, gradient: Tensor) -> None:
        """A batch's token ids [n, seq], and the gradients of their rows of the table [n, seq, dim]."""


def backward(walk: Walk, seed: int, see: See, ends: Ends) -> None:
    """Take gradients back through all blocks, calling see(name, block, backward) for each; it must call `run`.

    seed: of the tokens drawn.
    """
    gradient = _end(walk, seed, ends)
    for stack in reversed(range(len(walk.passages))):
        beside: dict[str, Stream] = {}
        names, states = walk.passages[stack].stack.blocks, walk.before[stack]
        for i in reversed(range(len(names))):
            into = Stream(_beside(states[i]), gradient.samples, states[i].shape, torch.float32)
            block = on(walk.streamer.skeleton.load_module(names[i]), walk.streamer.device)
            see(names[i], block, Backward(walk, stack, i, block, gradient, into, beside))
            walk.streamer.skeleton.drop_module(names[i])
            gradient.delete()
            gradient = into
            give_back()
        before = _inputs(walk, stack, gradient, beside, ends)
        gradient.delete()
        gradient = before


def _beside(states: Stream) -> Path:
    return states.path.with_name(f"{states.path.name}.gradient")


def _end(walk: Walk, seed: int, ends: Ends) -> Stream:
    """The gradients of what the last stack puts out."""
    streamer, states = walk.streamer, walk.before[-1][-1]
    model: Any = streamer.skeleton.model
    found = Stream(_beside(states), states.samples, states.shape, torch.float32)
    draw = torch.Generator().manual_seed(seed)
    for at, n in _through(walk):
        leaf: list[Tensor] = []
        stub = _stub(walk, len(walk.passages) - 1, at, n, leaf)
        watched = _watch_head(model.get_output_embeddings(), ends)
        with torch.enable_grad(), watched, stubbed(model, stub, list(streamer.stacks.values())):
            logits = streamer.call(at, n).logits
            logits.backward(_drawn(logits.detach(), draw))
        assert leaf[0].grad is not None
        found.write(at, leaf[0].grad)
    return found


def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """p − 1 for a token drawn at every place, p for all others: minus the gradient of its log-probability."""
    gradient = torch.empty_like(logits)
    rows = logits.flatten(0, -2).split(ROWS)
    for row, out in zip(rows, gradient.flatten(0, -2).split(ROWS), strict=True):
        p = row.float().softmax(-1)
        drawn = torch.multinomial(p.cpu(), 1, generator=draw).to(p.device)
        out.copy_(p.scatter_add_(-1, drawn, p.new_full((), -1.0).expand(drawn.shape)))
    return gradient


@contextmanager
def _watch_head(head: nn.Module | None, ends: Ends) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        h = args[0].detach()
        output.register_hook(lambda g: ends.head(module, h, g))

    handle = None if head is None else head.register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _watch_embeddings(model: nn.Module, found: list[tuple[nn.Module, Tensor, Tensor]]) -> Iterator[None]:
    """Within: what is looked up in the model's table are leaves, kept in `found` with their ids.  An encoder and a
    decoder may look into one table with a module each."""
    whole: Any = model
    table = whole.get_input_embeddings()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        found.append((module, args[0], output.detach().requires_grad_()))
        return found[-1][2]

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.weight is getattr(table, "weight", None):
                hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _of_table(module: Any, ids: Tensor, looked_up: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of rows of a table, from that of what came out: some models multiply it by a factor first."""
    rows = module.weight.detach()[ids].float()
    factor = float((rows * looked_up.detach().float()).sum() / rows.square().sum().clamp(min=1e-30))
    return gradient.float() * factor


def _through(walk: Walk) -> Iterator[tuple[int, int]]:
    """(first sample, samples) of every batch, with what is outside the blocks loaded."""
    streamer = walk.streamer
    streamer.skeleton.load(streamer.outside)
    yield from streamer.batches
    streamer.skeleton.drop(streamer.outside)
    give_back()


def _stub(walk: Walk, stack: int, at: int, n: int, leaf: list[Tensor]) -> Callable[..., Any]:
    """A stub for all stacks, where what this one puts out is a leaf."""
    name, replay = walk.passages[stack].stack.name, walk.streamer.replay(at, n)

    def stub(which: str, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passage = walk.passages[stack]
        if which != name or i != len(passage.stack.blocks) - 1:
            return replay(which, i, args, kwargs)
        leaf.append(walk.before[stack][-1].read(at, n).requires_grad_())
        return like(passage.output, leaf[0])

    return stub


def _inputs(walk: Walk, stack: int, gradient: Stream, beside: dict[str, Stream], ends: Ends) -> Stream:
    """From the gradients of what a stack reads to those of what the one before it puts out, and of embeddings."""
    streamer, model = walk.streamer, walk.streamer.skeleton.model
    states = walk.before[max(0, stack - 1)][-1]
    found = Stream(_beside(states), states.samples, states.shape, torch.float32)
    name = walk.passages[stack].stack.name
    for at, n in _through(walk):
        leaf: list[Tensor] = []
        inner = _stub(walk, stack - 1, at, n, leaf) if stack else None
        # what is the same for all samples has a gradient of another shape, and is not another stack's
        given = {path: stream.read(at, n) for path, stream in beside.items() if stream.complete()}
        stub = _back_from(name, gradient.read(at, n), given, inner)
        looked: list[tuple[nn.Module, Tensor, Tensor]] = []
        watched = _watch_embeddings(model, looked)
        with torch.enable_grad(), watched, stubbed(model, stub, list(streamer.stacks.values())), suppress(Reached):
            streamer.call(at, n)
        for module, ids, out in looked:
            if out.grad is not None:
                ends.embedded(module, ids, _of_table(module, ids, out, out.grad))
        done = leaf[0].grad if leaf and leaf[0].grad is not None else torch.zeros(n, *states.shape)
        found.write(at, done)
    for stream in beside.values():
        stream.delete()
    return found


def _back_from(
    name: str, gradient: Tensor, beside: dict[str, Tensor], inner: Callable[..., Any] | None
) -> Callable[..., Any]:
    """A stub that takes gradients back from the arguments of the first block of the stack of that name."""

    def stub(which: str, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if which != name:
            assert inner is not None
            return inner(which, i, args, kwargs)
        x = first_tensor(args, kwargs)
        pairs = [(x, gradient), *((t, beside[path]) for path, t in _tensors((args, kwargs)) if path in beside)]
        pairs = [(t, g.to(t.dtype)) for t, g in pairs if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        raise Reached

    return stub


def _tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, tuple | list):
        for i, item in enumerate(tree):
            yield from _tensors(item, f"{path}/{i}")
    elif isinstance(tree, dict):
        for name, item in tree.items():
            yield from _tensors(item, f"{path}/{name}")
    elif isinstance(tree, Tensor):
        yield path, tree
