"""How the model calls its blocks: recorded once per batch with the blocks left out, replayed block by block.

The model itself is run with every block replaced by a stub, so whatever it prepares for a block (masks, rotary
tables that differ between layer types, an encoder's output) is prepared by its own code.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.blocks import Stack, hidden


class Reached(Exception):
    """Raised by a stub to leave the model's forward."""


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a recorded call; `key` tells tensors apart, `is_hidden` marks the stream itself."""

    key: str
    is_hidden: bool = False


@dataclass
class Calls:
    """The arguments of every block of one stack, for every batch.

    Tensors that are equal in all batches are held once; those that differ lie on disk, a file per batch.
    """

    folder: Path
    templates: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)
    batches: int = 0

    def add(self, recorded: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """One batch: the calls of all blocks, in order."""
        differing: dict[str, Tensor] = {}
        seen: dict[int, str] = {}
        for block, (args, kwargs) in enumerate(recorded):
            template = _fill((args, kwargs), _Recorder(self, f"{block}", seen, differing))
            if self.batches == 0:
                self.templates.append(template)
        if differing:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({k: t.contiguous() for k, t in differing.items()}, self._file(self.batches))
        self.batches += 1

    def arguments(
        self, block: int, batch: int, x: Tensor, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `block` is to be called with, the hidden state being x."""
        return _call(self.templates[block], x, self.constants, self._stored(batch), device)

    def _stored(self, batch: int) -> dict[str, Tensor]:
        """What differs between batches."""
        stored = load_file(self._file(batch)) if self.varying and self._file(batch).exists() else {}
        return {key: tensor.clone() for key, tensor in stored.items()}  # mapped memory is not aligned for torch

    def excerpt(self, block: int, batches: Iterable[int]) -> "Excerpt":
        """The calls of one block for some batches, without a file."""
        keys: set[str] = set()
        _fill(self.templates[block], lambda leaf, _: keys.add(leaf.key) if isinstance(leaf, _Slot) else None)
        constants = {key: self.constants[key] for key in keys if key in self.constants}
        stored = [{k: t for k, t in self._stored(batch).items() if k in keys} for batch in batches]
        return Excerpt(block, self.templates[block], constants, stored)

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch:05d}.safetensors"


@dataclass
class Excerpt:
    """The calls of one block for some batches, numbered from 0.  Asked as `Calls` are."""

    block: int
    template: tuple[tuple[Any, ...], dict[str, Any]]
    constants: dict[str, Tensor]
    stored: list[dict[str, Tensor]]

    def arguments(
        self, block: int, batch: int, x: Tensor, device: str = "cpu"
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert block == self.block
        return _call(self.template, x, self.constants, self.stored[batch], device)


def _call(
    template: tuple[tuple[Any, ...], dict[str, Any]], x: Tensor, constants: Mapping[str, Tensor],
    stored: Mapping[str, Tensor], device: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """A recorded call with tensors in its slots."""

    def value(leaf: Any, path: str) -> Any:
        if not isinstance(leaf, _Slot):
            return leaf
        tensor = x if leaf.is_hidden else stored[leaf.key] if leaf.key in stored else constants[leaf.key]
        return tensor.to(device) if device != "cpu" else tensor

    args, kwargs = _fill(template, value)
    return args, kwargs


class _Recorder:
    """Turns the tensors of a call into slots, filing each under a key that is the same in every batch."""

    def __init__(self, calls: Calls, block: str, seen: dict[int, str], differing: dict[str, Tensor]) -> None:
        self.calls, self.block, self.seen, self.differing = calls, block, seen, differing
        self.first_tensor = True

    def __call__(self, leaf: Any, path: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self.first_tensor:  # every block takes the hidden state first
            self.first_tensor = False
            return _Slot("", is_hidden=True)
        key = self.seen.setdefault(id(leaf), f"{self.block}{path}")
        first = self.calls.constants.setdefault(key, leaf)
        if first is not leaf and not (first.shape == leaf.shape and torch.equal(first, leaf)):
            self.calls.varying.add(key)
            self.differing[key] = leaf
        return _Slot(key)


def _fill(tree: Any, value: Callable[[Any, str], Any], path: str = "") -> Any:
    """The same nesting of tuples, lists and dicts with every leaf replaced by value(leaf, path)."""
    if isinstance(tree, tuple | list):
        return type(tree)(_fill(item, value, f"{path}/{i}") for i, item in enumerate(tree))
    if isinstance(tree, dict):
        return {name: _fill(item, value, f"{path}/{name}") for name, item in tree.items()}
    return value(tree, path)


@contextmanager
def stubbed(
    model: nn.Module, stub: Callable[[str, int, tuple[Any, ...], dict[str, Any]], Any], stacks: list[Stack]
) -> Iterator[None]:
    """Within: every block of these stacks calls stub(stack name, block index, args, kwargs) instead of itself."""
    blocks = [(s.name, i, model.get_submodule(name)) for s in stacks for i, name in enumerate(s.blocks)]
    for stack, i, block in blocks:
        block.forward = lambda *args, _s=stack, _i=i, **kwargs: stub(_s, _i, args, kwargs)
    try:
        yield
    finally:
        for _, _, block in blocks:
            del block.forward


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a block's arguments."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor):
            return item
    raise AssertionError("a block was called without a tensor")


def like(output: Any, x: Tensor) -> Any:
    """What a block returned, with its hidden state replaced by x."""
    hidden(output)
    return x if isinstance(output, Tensor) else type(output)((x, *output[1:]))
