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

Stamp = list[int]  # address and version of every component


class Entry:
    """Everything derived from one list of components, as they are now."""

    def __init__(self, owner: weakref.ref[Tensor], parts: Sequence[Tensor], stamp: Stamp) -> None:
        self.owner = owner
        # An address identifies a storage only while the storage is alive.
        self.storages = [part.untyped_storage() for part in parts]
        self.stamp = stamp
        self.derived: dict[Hashable, Any] = {}

    def derive(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned when last called for this key.  If it takes memory, it has `nbytes`."""
        if key not in self.derived:
            with torch.no_grad():
                self.derived[key] = make()
        return self.derived[key]


_ENTRIES: dict[int, Entry] = {}


def trackable(parts: Sequence[Tensor]) -> bool:
    """Whether a later in-place change of these tensors can be noticed at all."""
    return not any(part.is_inference() for part in parts)


def entry(parts: Sequence[Tensor]) -> Entry:
    """What is known of these components.  Nothing is remembered of those whose changes could not be noticed."""
    stamp: Stamp = []
    try:
        for part in parts:
            stamp += (part.data_ptr(), part._version)
    except RuntimeError:  # made under torch.inference_mode: no version
        if trackable(parts):
            raise
        return Entry(weakref.ref(parts[0]), parts, stamp)
    found = _ENTRIES.get(id(parts[0]))
    if found is None or found.stamp != stamp or found.owner() is not parts[0]:
        found = _remember(parts, stamp)
    return found


def _remember(parts: Sequence[Tensor], stamp: Stamp) -> Entry:
    key = id(parts[0])

    def drop(owner: object) -> None:
        # the id of a dead tensor may already belong to another one
        if key in _ENTRIES and _ENTRIES[key].owner is owner:
            del _ENTRIES[key]

    made = _ENTRIES[key] = Entry(weakref.ref(parts[0], drop), parts, stamp)
    return made


def forget(parts: Sequence[Tensor]) -> None:
    """Free what was derived from these components; the next call derives it again."""
    if parts:
        _ENTRIES.pop(id(parts[0]), None)


def size() -> int:
    """Bytes held by everything derived so far."""
    return sum(getattr(pack, "nbytes", 0) for found in _ENTRIES.values() for pack in found.derived.values())
