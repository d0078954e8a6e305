"""What of a model touches its residual stream: found by looking at one run, not in a table of architectures."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import SourceError
from ..blocks import is_fused_experts
from ..sites import TOLERANCE, measured_offset
from ..skeleton import Skeleton
from ..trace import apart, norms

HINT = "leave `rotate` out, or turn values only: `--set rotate.stream=false`"


@dataclass(frozen=True)
class Matrix:
    """A parameter that reads or writes the stream: [.., out, in], transposed: [in, out].  bias: its name."""

    parameter: str
    transposed: bool = False
    bias: str | None = None


@dataclass(frozen=True)
class StreamNorm:
    """A norm that computes normalized · (offset + weight) + bias of the stream, and what reads that.

    centers: it subtracts the mean over the channels.
    """

    module: str
    offset: float
    centers: bool
    bias: bool
    readers: tuple[Matrix, ...] = ()


@dataclass
class Structure:
    """All that touches a residual stream of so many channels.

    tables: embeddings that are summed into it.  norms: those in front of what reads it, the last one's reader being the
    head.  writers: the matrices whose outputs are added to it.  unread: norms as wide as the stream whose output no
    layer reads.
    """

    width: int
    tables: list[str] = field(default_factory=list)
    norms: list[StreamNorm] = field(default_factory=list)
    writers: list[Matrix] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def centered(self) -> bool:
        """Whether nothing that reads the stream sees its mean over the channels."""
        return all(norm.centers for norm in self.norms)


def refuse(skeleton: Skeleton, why: str) -> SourceError:
    return SourceError(f"the residual stream of {skeleton.source.id} cannot be rotated: {why}", HINT)


def check_kind(skeleton: Skeleton, stacks: Iterable[Any]) -> None:
    """Raises SourceError for a model that is more than one stack of blocks between embeddings and a head."""
    config = skeleton.source.config
    if config.is_encoder_decoder:
        raise refuse(skeleton, "its decoder reads an encoder's output too")
    if config.get_text_config(decoder=True) is not config or len(list(stacks)) != 1:
        raise refuse(skeleton, "it reads more than text")


def outside(skeleton: Skeleton, blocks: Iterable[str], width: int) -> Structure:
    """Embeddings, last norm and head.  Raises SourceError, with the name of whatever else is there."""
    found, last, model = Structure(width), list[str](), skeleton.model
    prefixes = tuple(f"{name}." for name in blocks)
    head = model.get_output_embeddings()
    stream_norms = norms(model)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or name.startswith(prefixes) or module is head:
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            found.tables.append(f"{name}.weight")
        elif name in stream_norms:
            last.append(name)
        elif isinstance(module, nn.Embedding):
            raise refuse(skeleton, f"`{name}` is not as wide as its blocks")
        else:
            raise refuse(skeleton, f"`{name}` is neither embedding nor norm, and outside of the blocks")
    if not isinstance(head, nn.Linear) or not found.tables:
        raise refuse(skeleton, "it has no head, or no embeddings as wide as its blocks")
    if len(last) != 1:
        named = " and ".join(f"`{name}`" for name in last)
        raise refuse(
            skeleton,
            f"besides the last norm another one stands outside of the blocks ({named})" if last
            else "no norm stands between its blocks and its head",
        )  # fmt: skip
    skeleton.load([f"{last[0]}.weight", f"{last[0]}.bias"])
    reader = Matrix(f"{_name(model, head)}.weight", bias=None if head.bias is None else f"{_name(model, head)}.bias")
    norm = _measured(skeleton, last[0], model.get_submodule(last[0]), width)
    found.norms.append(replace(norm, readers=(reader,)))
    return found


def table(model: PreTrainedModel) -> nn.Embedding:
    """The token embeddings."""
    found: nn.Embedding = model.get_input_embeddings()
    return found


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _measured(skeleton: Skeleton, name: str, module: nn.Module, width: int) -> StreamNorm:
    offset = measured_offset(module, width)
    if offset is None:
        raise refuse(skeleton, f"`{name}` is a norm whose output is not a gain times what it normalized")
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1)).to(next(module.parameters()))
    centers = apart(module(x + 1).float(), module(x).float()) < TOLERANCE
    return StreamNorm(name, offset, centers, getattr(module, "bias", None) is not None)


def inside(skeleton: Skeleton, prefix: str, block: nn.Module, run: Callable[[], Any], found: Structure) -> None:
    """Add what one block has.  run: one batch through it; its weights must be there."""
    read_by = _readers(block, run)
    wide = {n: m for n, m in norms(block).items() if m.get_parameter("weight").shape == (found.width,)}
    reading = {reader for found_readers in read_by.values() for reader in found_readers}
    for name, module in wide.items():
        if not read_by.get(name):
            found.unread.append(f"{prefix}.{name}")
            continue
        if strange := [reader for reader in read_by[name] if not _is_known(block.get_submodule(reader))]:
            raise refuse(skeleton, f"hfquant does not know how `{prefix}.{strange[0]}` keeps its weights")
        matrices = [m for reader in read_by[name] for m in _matrices(block, prefix, reader, reads=True)]
        norm = _measured(skeleton, f"{prefix}.{name}", module, found.width)
        found.norms.append(replace(norm, readers=tuple(matrices)))
    for name in _owners(block):
        module = block.get_submodule(name)
        if _is_known(module) and (name not in reading or is_fused_experts(module)):
            matrices = list(_matrices(block, prefix, name, reads=False))
            found.writers += [m for m in matrices if _out(skeleton.model, m) == found.width]


def _out(model: nn.Module, matrix: Matrix) -> int:
    return model.get_parameter(matrix.parameter).shape[-1 if matrix.transposed else -2]


def _is_known(module: nn.Module) -> bool:
    """Whether its matrices are [out, in], or transposed as Conv1D has them: a linear layer, a router, fused experts."""
    shapes = [p.ndim for p in module.parameters(recurse=False) if p.ndim > 1]
    return isinstance(module, nn.Linear | Conv1D) or is_fused_experts(module) or shapes == [2]


def _owners(block: nn.Module) -> list[str]:
    """The modules that own matrices, but for tables that are looked up."""
    return [
        name
        for name, module in block.named_modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Embedding)
    ]


def _matrices(block: nn.Module, prefix: str, name: str, *, reads: bool) -> Iterator[Matrix]:
    """The matrices of a module that read its input; else those that write its output."""
    module, path = block.get_submodule(name), f"{prefix}.{name}"
    bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
    for leaf, p in module.named_parameters(recurse=False):
        down = leaf.startswith("down")
        if p.ndim > 1 and (not is_fused_experts(module) or down != reads):
            yield Matrix(f"{path}.{leaf}", isinstance(module, Conv1D), bias)


def _readers(block: nn.Module, run: Callable[[], Any]) -> dict[str, list[str]]:
    """Norm -> the modules with matrices that are called with the very tensor it puts out."""
    found: dict[str, list[str]] = {}
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is used twice while the block runs

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if (norm := made.get(x.data_ptr())) is not None and name not in found.setdefault(norm, []):
                found[norm].append(name)
            alive.append(x)

        return hook

    def wrote(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            made[y.data_ptr()] = name
            alive.append(y)

        return hook

    with ExitStack() as hooks:
        for name in _owners(block):
            module = block.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(read(name), with_kwargs=True).remove)
        for name, module in norms(block).items():
            hooks.callback(module.register_forward_hook(wrote(name)).remove)
        run()
    return found
