"""One pass forward and one back, block by block: how far an error in a layer's output moves the model's predictions.

Forward, the hidden states before every block stay on disk.  At the end a token is drawn from what the model predicts
at every place; the gradient of its log-probability is taken back, from the last block to the first, each being run
again.  In memory there is one block, as in a compression; what grows with depth is on disk.

With labels drawn from the model itself, the mean of these gradients' squares is the Fisher matrix, which is the second
derivative of the KL divergence from the original: KL ≈ ½ E(gᵀδ)², whatever the text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.activations import Stream
from ..compress.calls import first_tensor
from ..memory import give_back
from ..model.blocks import hidden
from .outside import Ends, gradients_of, head_gradients, input_gradients
from .walk import Walk, on

See = Callable[[str, nn.Module, "Backward"], None]


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
    def look(self, *, judged: bool = False) -> None:
        """The batches that layers learn from through the block, or those that are judged."""
        passage = self.walk.passages[self.stack]
        for batch in (i for i, _, _ in self.walk.back()) if judged else self.walk.learned():
            args, kwargs = passage.arguments(self.index, batch, self.walk.before[self.stack][self.index])
            self.block(*args, **kwargs)

    def run(self, begin: Callable[[int], None], *, last: bool = True) -> None:
        """The batches that are judged through the block and back.  begin(n): called before each, of n samples.  last:
        whether the gradients of what the block reads are written."""
        passage = self.walk.passages[self.stack]
        for batch, at, n in self.walk.back():
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


def backward(walk: Walk, seed: int, see: See, ends: Ends) -> None:
    """Take gradients back through all blocks, calling see(name, block, backward) for each; it must call `run`.

    seed: of the tokens drawn.
    """
    gradient = head_gradients(walk, seed, ends)
    for stack in reversed(range(len(walk.passages))):
        beside: dict[str, Stream] = {}
        names, states = walk.passages[stack].stack.blocks, walk.before[stack]
        for i in reversed(range(len(names))):
            into = Stream(gradients_of(states[i]), gradient.samples, states[i].shape, torch.float32)
            block = on(walk.streamer.skeleton.load_module(names[i]), walk.streamer.device)
            see(names[i], block, Backward(walk, stack, i, block, gradient, into, beside))
            walk.streamer.skeleton.drop_module(names[i])
            gradient.delete()
            gradient = into
            give_back()
        before = input_gradients(walk, stack, gradient, beside, ends)
        gradient.delete()
        gradient = before
