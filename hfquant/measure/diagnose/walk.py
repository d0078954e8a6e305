"""One model, dense or compressed, looked at block by block: its weights, what its layers read, its embeddings.

One block is in memory at a time, the hidden states lie on disk; of what is seen only a few numbers are kept.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...compress.calls import Reached
from ...compress.observe import Group, discover
from ...compress.streaming import Passage, Streamer
from ...methods.smoothquant import factors
from ...model.blocks import is_fused_experts, weights
from ...model.skeleton import Skeleton
from ...runtime.experts import QExperts
from ...runtime.nn import Packed
from .statistics import histogram, shape_of, spread

TOKENS = 500  # the most frequent ones, whose embeddings are looked at, as in QuantGPT's figure; and hidden states
ALPHA = 0.5  # SmoothQuant's, in the paper


@dataclass
class Seen:
    """What is kept of a model.

    weights, inputs: a row for every matrix of a block and for every input that layers share, plain numbers only.
    histograms: (stack, role) -> weights by size.  tables: "embeddings" and "hidden", float32 [≤ TOKENS, d].
    """

    weights: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def walk(skeleton: Skeleton, tokens: Tensor, folder: Path, batch: int = 4) -> Seen:
    """tokens int64 [samples, seq], of which `batch` samples go through a block together; `folder` is for states."""
    seen, streamer = Seen(), Streamer(skeleton, tokens, folder, batch)
    for passage in streamer.passages():
        for i, name in enumerate(passage.stack.blocks):
            block = skeleton.load_module(name)
            groups = _groups(block, passage, i)
            _see_weights(seen, block, passage.stack.name, i, _outputs(groups))
            _follow(seen, block, passage, i, groups)
            skeleton.drop_module(name)
    _see_ends(seen, streamer)
    return seen


def matrices(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a block as they multiply: role (its path in the block), float32 [out, in] or [experts, out, in].

    One at a time: the next makes the last one disappear.
    """
    for name, module in block.named_modules():
        if isinstance(module, QExperts):
            for param in module.packed:
                yield f"{name}.{param}", module.dequantize(param, torch.float32)
        elif isinstance(module, Packed):
            yield name, module.dequantize(torch.float32)
        else:
            for weight in weights(module) if _owns(module) else ():
                role = f"{name}.{weight.name}".removesuffix(".weight").strip(".")
                yield role, weight.get(module).float()


def _owns(module: nn.Module) -> bool:
    """Whether this module itself, not one below it, holds matrices."""
    return is_fused_experts(module) or (not list(module.children()) and any(weights(module)))


def _groups(block: nn.Module, passage: Passage, index: int) -> list[Group]:
    """The groups of layers with a common input, in the order in which they are reached; no experts."""
    ordinary = [w for w in weights(block) if w.kind != "experts" and not isinstance(_at(block, w.module), QExperts)]
    return discover(block, passage, index, ordinary)


def _at(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name)


def _outputs(groups: list[Group]) -> set[str]:
    """The output projections of attention: reached last of those below the module of the block's first layers.

    Of self-attention: in every block that we know of it comes first, and its input projections before its output.
    """
    if not groups:
        return set()
    parent = groups[0].leader.rpartition(".")[0]
    inside = [group for group in groups if parent and group.leader.rpartition(".")[0] == parent]
    return {member.module for member in inside[-1].members} if len(inside) > 1 else set()


def _see_weights(seen: Seen, block: nn.Module, stack: str, index: int, outputs: set[str]) -> None:
    for role, W in matrices(block):
        place = {"stack": stack, "block": index, "role": role, "attention_output": role in outputs}
        seen.weights.append({**place, "shape": list(W.shape), "rows": spread(W.abs().amax(-1)), **shape_of(W)})
        key = (stack, role)
        seen.histograms[key] = seen.histograms.get(key, 0) + histogram(W)


def _follow(seen: Seen, block: nn.Module, passage: Passage, index: int, groups: list[Group]) -> None:
    """Move the stream past a block, and look at what its layers read on the way."""
    ranges: dict[Group, list[Tensor]] = {group: [] for group in groups}
    largest: dict[Group, Tensor] = {}

    def hook(group: Group) -> Any:
        scale = _divisor(_at(block, group.leader))

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            size = x.reshape(-1, x.shape[-1]).float().abs()
            size = size if scale is None else size / scale
            ranges[group].append(size.amax(1))
            top = size.amax(0)
            largest[group] = torch.maximum(largest[group], top) if group in largest else top

        return look

    before = passage.stream
    with ExitStack() as hooks:
        for group in groups:
            module = _at(block, group.leader)
            hooks.callback(module.register_forward_pre_hook(hook(group), with_kwargs=True).remove)
        passage.advance(block, index)
    before.delete()
    for group in groups:
        seen.inputs.append(
            {
                "stack": passage.stack.name,
                "block": index,
                "roles": [member.module for member in group.members],
                "tokens": spread(torch.cat(ranges[group])),
                **_channels(block, group, largest[group]),
            }
        )


def _divisor(module: nn.Module) -> Tensor | None:
    """What a compressed layer divides its input by before it uses it."""
    found = module.matrix.extras.input_scale if isinstance(module, Packed) else None
    return None if found is None else found.float()


def _channels(block: nn.Module, group: Group, x: Tensor) -> dict[str, float]:
    """The largest magnitude of the largest channel over that of the median one, as it is and after smoothing."""
    columns = [W.abs().amax(0) for W in (_matrix(_at(block, m.module)) for m in group.members)]
    s = factors(x, torch.stack(columns).amax(0), ALPHA)
    return {"channel_ratio": _ratio(x), "channel_ratio_smoothed": _ratio(x / s), "channel_max": float(x.max())}


def _matrix(module: nn.Module) -> Tensor:
    return next(W for _, W in matrices(module))


def _ratio(x: Tensor) -> float:
    return float(x.max() / x.median().clamp(min=1e-30))


def _see_ends(seen: Seen, streamer: Streamer) -> None:
    """The embeddings of the most frequent tokens, and what the head reads of the first batch."""
    model = streamer.skeleton.model

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = x.reshape(-1, x.shape[-1])
        seen.tables["hidden"] = rows[:: max(1, len(rows) // TOKENS)][:TOKENS].float()
        raise Reached

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with suppress(Reached):
            next(streamer.logits())
    finally:
        handle.remove()
    seen.tables["embeddings"] = model.get_input_embeddings()(frequent(streamer.tokens)).float()


def frequent(tokens: Tensor) -> Tensor:
    """The tokens that a text has the most, at most TOKENS, in an order of their own.  int64 [n]"""
    found, count = tokens.unique(return_counts=True)
    order = count.argsort(descending=True, stable=True)
    return found[order[:TOKENS]]
