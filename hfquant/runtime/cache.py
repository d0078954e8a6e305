"""What a kernel derived from packed components, kept for as long as those components stay what they were.

The cache lives beside the tensors, not in the modules: it is in no state dict, no pickle and no copy, and a
compiled graph finds it as well as eager code does.  A changed component is noticed by what torch itself uses
to notice it (autograd's version counter), a replaced one by its identity and its storage.  Writing through an
alias that torch does not track (`parameter.data.copy_`, numpy, another process) goes unnoticed by torch and by
this cache alike; after such a write call `forget`.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Stamp = tuple[tuple[int, int], ...]


class _Entry:
    """Everything derived from one list of components, by the first of them."""

    def __init__(self, owner: weakref.ref[Tensor], parts: Sequence[Tensor], stamp: Stamp) -> None:
        self.owner = owner
        # An address identifies a storage only while the storage is alive.
        self.storages = [part.untyped_storage() for part in parts]
        self.stamp = stamp
        self.derived: dict[Hashable, Any] = {}


_ENTRIES: dict[int, _Entry] = {}


def trackable(parts: Sequence[Tensor]) -> bool:
    """Whether a later in-place change of these tensors can be noticed at all."""
    return not any(part.is_inference() for part in parts)


def derive(parts: Sequence[Tensor], key: Hashable, make: Callable[[], Any]) -> Any:
    """`make()`, or what it returned when last called for these components and this key.

    What it makes must have `nbytes`.  Nothing is kept of components whose changes could not be noticed.
    """
    if not trackable(parts):
        with torch.no_grad():
            return make()
    stamp = tuple((part.data_ptr(), part._version) for part in parts)
    entry = _ENTRIES.get(id(parts[0]))
    if entry is None or entry.owner() is not parts[0] or entry.stamp != stamp:
        entry = _remember(parts, stamp)
    if key not in entry.derived:
        with torch.no_grad():
            entry.derived[key] = make()
    return entry.derived[key]


def _remember(parts: Sequence[Tensor], stamp: Stamp) -> _Entry:
    key = id(parts[0])

    def drop(owner: object) -> None:
        # the id of a dead tensor may already belong to another one
        if key in _ENTRIES and _ENTRIES[key].owner is owner:
            del _ENTRIES[key]

    entry = _ENTRIES[key] = _Entry(weakref.ref(parts[0], drop), parts, stamp)
    return entry


def forget(parts: Sequence[Tensor]) -> None:
    """Free what was derived from these components; the next call derives it again."""
    if parts:
        _ENTRIES.pop(id(parts[0]), None)


def size() -> int:
    """Bytes held by everything derived so far."""
    return sum(pack.nbytes for entry in _ENTRIES.values() for pack in entry.derived.values())
