"""What a block's layers see: which of them share an input, and XXᵀ of every such input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..model.blocks import Weight, hidden
from ..runtime.gram import add_gram, add_product
from .activations import Stream
from .calls import Reached
from .rounding import Ranges
from .streaming import Passage

Call = tuple[tuple[Any, ...], dict[str, Any]]
Onward = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Group:
    """Weights that read the same input (q, k, v; gate, up), in the order in which a block reaches them.

    `leader` is the module at which the input is looked at.  One expert tensor is a group of its own.
    """

    leader: str
    members: tuple[Weight, ...]

    @property
    def is_experts(self) -> bool:
        return self.members[0].kind == "experts"


@dataclass
class Statistics:
    """Sums over the tokens that reached one input.

    H [in, in] = Σ x xᵀ.  C [in, in] = Σ x̃ xᵀ, x̃ being the same token's input in the original model.
    """

    in_features: int
    tokens: int = 0
    _sum: Tensor | None = None  # the lower triangle of Σ x xᵀ, in panels
    _drift: Tensor | None = None  # Σ (x̃ − x) xᵀ

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """x [tokens, in]"""
        self.tokens += x.shape[0]
        if self._sum is None:
            self._sum = torch.zeros(self.in_features, self.in_features, device=x.device)
        add_gram(self._sum, x)
        if original is not None:
            if self._drift is None:
                self._drift = torch.zeros_like(self._sum)
            # C = H + drift.  The drift is a correction: the difference is exact enough in the type of the block
            add_product(self._drift, original.to(x.dtype) - x, x)

    def merge(self, other: "Statistics") -> None:
        """Add what others have summed over other tokens."""
        self.tokens += other.tokens
        for name in ("_sum", "_drift"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs.cpu() if mine is None else mine.add_(theirs.to(mine.device)))

    def settle(self) -> None:
        """Leave the device on which it was summed."""
        self._sum, self._drift = (None if t is None else t.cpu() for t in (self._sum, self._drift))

    @property
    def H(self) -> Tensor | None:
        """Mean over tokens times two, as in the GPTQ paper; None if no token came."""
        if self._sum is None or not self.tokens:
            return None
        lower = self._sum.tril()
        return (lower + lower.tril(-1).T).mul_(2 / self.tokens).cpu()

    @property
    def C(self) -> Tensor | None:
        """Scaled as H; None where only one stream was run."""
        H = self.H
        return None if H is None or self._drift is None else H + (self._drift * (2 / self.tokens)).cpu()

    def taken(self) -> tuple[Tensor | None, Tensor | None]:
        """(H, C), and forget the sums: at the end of their use there is no room for both."""
        found = self.H, self.C
        self._sum = self._drift = None
        return found


def discover(block: nn.Module, passage: Passage, index: int, weights: Sequence[Weight]) -> list[Group]:
    """The groups of a block, seen by running one batch through it.  Weights it never uses are in no group."""
    reached: list[tuple[int, Weight]] = []
    alive: list[Tensor] = []  # so that no address is used twice while the block runs

    def hook(weight: Weight) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            alive.append(x)
            reached.append((id(x), weight))

        return record

    with ExitStack() as hooks:
        for weight in weights:
            handle = block.get_submodule(weight.module).register_forward_pre_hook(hook(weight), with_kwargs=True)
            hooks.callback(handle.remove)
        args, kwargs = passage.arguments(index, 0)
        block(*args, **kwargs)
    groups: dict[Any, list[Weight]] = {}
    for address, weight in reached:
        key = weight.name if weight.kind == "experts" else address
        if weight not in groups.setdefault(key, []):
            groups[key].append(weight)
    return [Group(members[0].module, tuple(members)) for members in groups.values()]


def observe(
    block: nn.Module,
    passage: Passage,
    index: int,
    groups: Sequence[Group],
    original: Mapping[str, Any] | None = None,
    experts: Mapping[Group, range] | None = None,
    batches: Sequence[int] | None = None,
    onward: Onward | None = None,
) -> dict[tuple[Group, int], Statistics]:
    """Run all batches, or these, and sum what reaches the groups: (group, expert) -> statistics, expert 0 for ordinary
    ones.

    `original`, from `record_original`, holds the inputs of the same layers in the original model; with it C is summed
    too.  experts: of a group, those to look at; by default all.  onward: called with a batch's first sample and what
    the block puts out; without it a batch is left as soon as the last of these groups has been reached.
    """
    found: dict[tuple[Group, int], Statistics] = {}
    for batch in range(len(passage.batches)) if batches is None else batches:
        at, n = passage.batches[batch]

        def add(group: Group, call: Call, at: int = at, n: int = n) -> None:
            if group.is_experts:
                module, weight = block.get_submodule(group.leader), group.members[0]
                wanted = range(weight.experts(block)) if experts is None else experts[group]
                for expert, x in _expert_inputs(module, weight, call, wanted):
                    found.setdefault((group, expert), Statistics(x.shape[-1])).add(x)
                return
            x, beside = _flat(_input(*call)), None
            if original is not None and group.leader in original:
                beside = _flat(original[group.leader].read(at, n)).to(x.device)
            found.setdefault((group, 0), Statistics(x.shape[-1])).add(x, beside)

        with _watch(block, groups, add, leave=onward is None):
            output = _run_until_reached(block, passage.arguments(index, batch))
        if onward is not None:
            onward(at, hidden(output))
    return found


def record_original(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], before: Stream, after: Stream
) -> dict[str, Stream]:
    """One pass of the untouched block over the original model's hidden states: `before` -> `after`.

    What its layers read on the way lies on disk afterwards, leader -> inputs.  Not for experts: the two streams may
    route a token differently.  A leader whose input is not [batch, ...] is left out.
    """
    inputs: dict[str, Stream] = {}
    after.delete()

    def keep(leader: str, at: int, x: Tensor) -> None:
        path = after.path.with_name(f"{after.path.name}.{leader}")
        inputs.setdefault(leader, Stream(path, before.samples, tuple(x.shape[1:]), x.dtype)).write(at, x)

    for at, out in run_original(block, passage, index, groups, before, keep):
        after.write(at, out)
    return inputs


def run_original(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], before: Any,
    see: Callable[[str, int, Tensor], None],
) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Batch by batch: its first sample, and what the untouched block puts out.  see(leader, first sample, x): called
    with what ordinary layers read, where that is [batch, ...]."""
    ordinary = [group for group in groups if not group.is_experts]
    for batch, (at, n) in enumerate(passage.batches):

        def keep(group: Group, call: Call, at: int = at, n: int = n) -> None:
            x = _input(*call)
            if x.shape[0] == n:
                see(group.leader, at, x)

        with _watch(block, ordinary, keep, leave=False):
            args, kwargs = passage.arguments(index, batch, before)
            yield at, hidden(block(*args, **kwargs))


def token_ranges(
    block: nn.Module, passage: Passage, index: int, groups: Sequence[Group], scales: Mapping[Weight, Tensor]
) -> dict[Group, Ranges]:
    """Run all batches and note the range of every token that reaches the groups, divided by the layers' scales.

    Of experts: as their module is given it.
    """
    found: dict[Group, Ranges] = {}

    def add(group: Group, call: Call) -> None:
        x, s = _input(*call), scales.get(group.members[0])
        found.setdefault(group, Ranges()).add(x if s is None else x.float() / s.to(x.device))

    for batch in range(len(passage.batches)):
        with _watch(block, groups, add):
            _run_until_reached(block, passage.arguments(index, batch))
    return found


@contextmanager
def _watch(
    block: nn.Module, groups: Sequence[Group], see: Callable[[Group, Call], None], leave: bool = True
) -> Iterator[None]:
    """Within: see(group, (args, kwargs)) when the block reaches a group; after the last of them it is left."""
    left = len(groups)

    def hook(group: Group) -> Any:
        def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal left
            see(group, (args, kwargs))
            left -= 1
            if leave and not left:
                raise Reached

        return reached

    with ExitStack() as hooks:
        for group in groups:
            module = block.get_submodule(group.leader)
            hooks.callback(module.register_forward_pre_hook(hook(group), with_kwargs=True).remove)
        yield


def _run_until_reached(block: nn.Module, call: Call) -> Any:
    """-> what the block puts out, None where it was left before."""
    try:
        return block(*call[0], **call[1])
    except Reached:
        return None


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _expert_inputs(experts: Any, weight: Weight, call: Call, wanted: range) -> Iterator[tuple[int, Tensor]]:
    """(expert, the tokens that reach it [tokens, in]) for one of the tensors of a fused-experts module."""
    args, kwargs = call
    hidden_states = _flat(_input(args, kwargs))
    routed = args[1] if len(args) > 1 else kwargs["top_k_index"]
    routed = routed.reshape(hidden_states.shape[0], -1)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    into_down = weight.name.endswith("down_proj")
    for expert in wanted:
        x = hidden_states[(routed == expert).any(-1)]
        if not len(x):
            continue
        if into_down:
            x = linear(x, first[expert])
            x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        yield expert, x
