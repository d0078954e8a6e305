"""The same compression for a model that is in memory already: what `from_pretrained` uses for calibrated recipes."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..methods.rtn import Method as Rtn
from ..model.blocks import weights
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from ..tensors.layer import Layer, Quantized
from .activations import Stream
from .blocksteps import in_scope, placed_steps, prepare, readings, ways
from .outputs import remembering
from .rounding import Rounding
from .selection import Target
from .solve import Work
from .streaming import Streamer, largest_batch
from .student import finish_block


@dataclass(frozen=True)
class _Config:
    config: Any


class Resident:
    """Stands for a skeleton whose every part is loaded and stays so."""

    stored: Mapping[str, list[str]] = {}

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.source = _Config(model.config)

    def load(self, names: Any, dtype: Any = None) -> None: ...

    def drop(self, names: Any) -> None: ...

    def load_module(self, prefix: str, dtype: Any = None) -> nn.Module:
        return self.model.get_submodule(prefix)

    def drop_module(self, prefix: str) -> None: ...


@torch.no_grad()
def compress_model(
    model: nn.Module,
    recipe: Recipe,
    targets: Mapping[str, Target],
    batches: Sequence[Tensor],
    scale_dtype: torch.dtype,
    *,
    free: bool = True,
) -> Iterator[tuple[str, Quantized]]:
    """Compress a loaded model, yielding (parameter name, result) in the order in which they are finished.

    The model's own weights are overwritten with the rounded ones as the work goes on.  batches: token ids int64
    [n, seq], all of one length.  free: whether the format can store more than symmetric grids.  Hidden states between
    blocks lie in a temporary folder.
    """
    block_steps, steps, final_steps = (in_scope(recipe.steps, scope) for scope in ("block", "linear", "finished"))
    tokens = torch.cat(list(batches)).cpu()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inside: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
        skeleton = cast(Skeleton, Resident(model, dtype))
        streamer = Streamer(skeleton, tokens, Path(folder), largest_batch(tokens, recipe))
        for passage in streamer.passages():
            original = None
            for i, name in enumerate(passage.stack.blocks):
                block = model.get_submodule(name)
                found = {w: targets[f"{name}.{w.name}"] for w in weights(block) if f"{name}.{w.name}" in targets}
                grids = {w: target.grid for w, target in found.items()}
                work = Work(
                    grids, placed_steps(steps, found), scale_dtype, readings=readings(found, recipe), free=free,
                    final_steps=final_steps, ways=ways(found, recipe),
                )  # fmt: skip
                types = {p: p.dtype for p in block.parameters()}
                for p in types:
                    p.data = p.data.float()
                masters, work, prepared = prepare(block, block_steps, work, passage, i, dtype)
                masters = {w: W.clone() for w, W in masters.items()}
                for p, own in types.items():
                    p.data = p.data.to(own)
                if original is None and (work.needs_original or final_steps):
                    original = passage.stream
                both = None
                if original is not None:
                    path = Path(folder) / f"{passage.stack.name}.original.{i + 1:05d}"
                    both = (original, Stream(path, original.samples, original.shape, original.dtype))
                before = passage.stream
                with Rounding(block) as rounding, remembering(block, passage):
                    for done in finish_block(block, masters, work, prepared, passage, i, rounding, both, dtype):
                        inside.add(f"{name}.{done.weight.name}")
                        yield f"{name}.{done.weight.name}", done.Q
                    passage.advance(block, i)
                if original is not None:
                    original.delete()
                before.delete()
                original = None if both is None else both[1]
    for name in targets.keys() - inside:
        layer = Rtn()(Layer(name=name, W=_matrix(model, targets[name]).float()), targets[name].grid, scale_dtype)
        assert layer.Q is not None
        yield name, layer.Q


def _matrix(model: nn.Module, target: Target) -> Tensor:
    """[out, in], the rows of all experts one after the other."""
    p = model.get_parameter(target.parameter).detach()
    return p.T if target.kind == "conv1d" else p.reshape(-1, p.shape[-1])
