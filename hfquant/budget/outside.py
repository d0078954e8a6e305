"""The way back through what is not in blocks: the head, the embeddings, and from one stack into the one before it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.activations import Stream
from ..compress.calls import Reached, first_tensor, like, stubbed
from ..memory import give_back
from .walk import Walk

ROWS = 128  # tokens of logits that are in float32


class Ends:
    """What is told of the ends of the model on the way back; does nothing itself."""

    def head(self, module: nn.Module, h: Tensor, gradient: Tensor) -> None:
        """A batch's inputs of the output head [n, seq, in], and the gradients of its outputs [n, seq, vocabulary]."""

    def embedded(self, module: nn.Module, ids: Tensor, gradient: Tensor) -> None:
        """A batch's token ids [n, seq], and the gradients of their rows of the table [n, seq, dim]."""


def gradients_of(states: Stream) -> Path:
    """The file for the gradients of hidden states."""
    return states.path.with_name(f"{states.path.name}.gradient")


def head_gradients(walk: Walk, seed: int, ends: Ends) -> Stream:
    """The gradients of what the last stack puts out."""
    streamer, states = walk.streamer, walk.before[-1][-1]
    model: Any = streamer.skeleton.model
    found = Stream(gradients_of(states), walk.judged, states.shape, torch.float32)
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
        drawn = sampled(p, draw)
        out.copy_(p.scatter_add_(-1, drawn, p.new_full((), -1.0).expand(drawn.shape)))
    return gradient


def sampled(p: Tensor, draw: torch.Generator) -> Tensor:
    """One index for every row of probabilities p [rows, n], int64 [rows, 1], by the inverse of their sums: for a
    vocabulary of 49 thousand a ninth of the time of `torch.multinomial`."""
    below = p.cumsum(-1)
    u = torch.rand(len(p), 1, generator=draw).to(p.device) * below[:, -1:]
    found = torch.searchsorted(below, u, right=True)  # right: what has no probability is not drawn
    return found.clamp(max=p.shape[-1] - 1)


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
    """(first sample, samples) of every batch that is taken back, with what is outside the blocks loaded."""
    streamer = walk.streamer
    streamer.skeleton.load(streamer.outside)
    yield from ((at, n) for _, at, n in walk.back())
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


def input_gradients(walk: Walk, stack: int, gradient: Stream, beside: dict[str, Stream], ends: Ends) -> Stream:
    """From the gradients of what a stack reads to those of what the one before it puts out, and of embeddings."""
    streamer, model = walk.streamer, walk.streamer.skeleton.model
    states = walk.before[max(0, stack - 1)][-1]
    found = Stream(gradients_of(states), walk.judged, states.shape, torch.float32)
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
