"""The operators of a compressed cache, as torch knows them: `hfquant::kv_pack` and `hfquant::kv_attend`.

Each is one opaque node for torch.compile; what runs inside is chosen in `kv_packed.attend`.  They have no gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from .kv_encode import NAMES, pack_tokens
from .kv_packed import PackedTokens
from .kv_packed import attend as _attend_packed
from .ops import LIBRARY

_CACHE = "int bits, int group, int channels"
LIBRARY.define(f"kv_pack(Tensor keys, Tensor values, {_CACHE}) -> Tensor[]")
LIBRARY.define(
    f"kv_attend(Tensor query, Tensor[] packed, Tensor[] recent, Tensor? mask, float scale, {_CACHE}, int[] sizes, "
    "int? queries) -> Tensor"
)


def attend(
    query: Tensor, tokens: PackedTokens, recent: tuple[Tensor, Tensor], scale: float, mask: Tensor | None = None
) -> Tensor:
    """`kv_packed.attend` by way of its operator."""
    packed = [getattr(tokens, name) for name in NAMES]
    how = tokens.bits, tokens.group, tokens.channels, tokens.sizes, tokens.queries
    found: Tensor = torch.ops.hfquant.kv_attend(query, packed, recent, mask, scale, *how)
    return found


def _attend(
    query: Tensor,
    packed: Sequence[Tensor],
    recent: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    bits: int,
    group: int,
    channels: int,
    sizes: Sequence[int],
    queries: int | None,
) -> Tensor:
    _check(query, packed, recent, mask, tuple(sizes))
    parts = dict(zip(NAMES, packed, strict=True))
    shape = (sizes[0], sizes[1])
    tokens = PackedTokens(**parts, bits=bits, group=group, channels=channels, sizes=shape, queries=queries)
    return _attend_packed(query, tokens, (recent[0], recent[1]), scale, mask)


def _check(
    query: Tensor, packed: Sequence[Tensor], recent: Sequence[Tensor], mask: Tensor | None, sizes: tuple[int, ...]
) -> None:
    """Raises ShapeError for what does not belong together."""
    keys, values = recent
    batch, heads, new = keys.shape[:3]
    past = packed[0].shape[2]
    fits = (
        query.dim() == 3 and query.shape[::2] == (batch, sizes[0]) and query.shape[1] % heads == 0,
        new > 0 and values.shape[:3] == keys.shape[:3] and sizes == (keys.shape[3], values.shape[3]),
        packed[3].shape[2] == past and all(part.shape[:2] == keys.shape[:2] for part in packed),
        mask is None or (mask.dtype == torch.bool and mask.shape == (batch, past + new)),
    )
    if all(fits):
        return
    wanted = (
        f"queries [{batch}, a multiple of {heads}, {sizes[0]}]",
        f"recent keys and values [{batch}, {heads}, at least 1, {' and '.join(map(str, sizes))}]",
        f"packed keys and values [{batch}, {heads}, {past}, ...]",
        f"a mask bool [{batch}, {past + new}]",
    )
    given = {"queries": query, "recent keys": keys, "recent values": values, "mask": mask}
    shapes = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in given.items() if t is not None)
    wrong = ", ".join(what for what, fit in zip(wanted, fits, strict=True) if not fit)
    raise ShapeError(f"attention over a compressed cache was given {shapes}", f"give it {wrong}")


def _fake_attend(query: Tensor, packed: Sequence[Tensor], recent: Sequence[Tensor], *_: object) -> Tensor:
    keys, values = recent
    torch._check(
        query.dim() == 3 and query.shape[-1] == keys.shape[-1] and query.shape[1] % keys.shape[1] == 0,
        lambda: f"queries {list(query.shape)} for keys {list(keys.shape)}",
    )
    return query.new_empty(*query.shape[:2], values.shape[-1])


def _fake_pack(keys: Tensor, values: Tensor, bits: int, group: int, channels: int) -> list[Tensor]:
    def three(x: Tensor, *scales: int) -> list[Tensor]:
        words = x.new_empty(*x.shape[:3], -(-x.shape[3] * bits // 32), dtype=torch.int32)
        return [words, *(x.new_empty(*x.shape[:2], *scales, dtype=torch.float16) for _ in range(2))]

    of_keys = three(keys, keys.shape[2] // group, keys.shape[3])
    return [*of_keys, *three(values, values.shape[2], values.shape[3] // channels)]


for _name, _run, _fake in (("kv_pack", pack_tokens, _fake_pack), ("kv_attend", _attend, _fake_attend)):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hfquant::{_name}", _fake, lib=LIBRARY)
