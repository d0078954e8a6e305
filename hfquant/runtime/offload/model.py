"""A model that runs with its blocks on disk, and generates as transformers does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ...errors import ResourceError
from ...memory import map_large_pieces
from ...model.blocks import stacks
from ..kv_cache import CompressedCache
from ..topk import use_topk
from .batch import Batch, Generation
from .loader import Loader
from .opening import open_model
from .pieces import collect
from .placement import Placement
from .policy import Policy
from .rooms import RoomLayer
from .schedule import Lane, Order, halting, run
from .scratch import Files, Scratch
from .shelf import Shelf
from .upload import Upload

# bytes of an activation that lies in the heap, whose pages are used again; larger ones come fresh from the system, that
# clears them.  The schedule gives back what is free after every stage, so holes do not add up.  With batches of 86 and
# 256, all of 64 kB coming fresh takes 12 to 15% longer; with up to 4 MB in the heap a process takes 10 to 21 MB more,
# which is counted (`planning.HOLES`), with up to 16 MB 50
HEAP = 4 << 20


class OffloadedModel:
    """A model whose blocks are in memory only while they run.  A context manager: leaving it frees everything.

    model: a folder or Hub id, dense or compressed by hfquant.  policy: what is placed where.  disk: the folder for
    temporary files.  device: where blocks are computed; with CUDA, weights are copied there on a stream of their own,
    and the cache that is not on disk stays there (written, not yet run on a GPU).  Raises SourceError for a model that
    cannot be read, ResourceError if the disk is too small.
    """

    def __init__(
        self,
        model: str | Path,
        policy: Policy | None = None,
        *,
        disk: str | Path | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.loader: Loader | None = None
        self.on_tokens: Callable[[int], None] | None = None  # told how many tokens every step of a batch made
        map_large_pieces(HEAP)
        self.device = torch.device(device)
        with ExitStack() as undo:
            self.skeleton = open_model(model, dtype, revision)
            self.model: Any = self.skeleton.model
            self.files, self.scratch = Files(), Scratch(Path(disk) if disk is not None else None)
            undo.callback(self.files.close)
            undo.callback(self.scratch.close)
            self.stacks = _in_order(self.skeleton)
            self._load_outside()
            blocks = [name for stack in self.stacks for name in stack.blocks]
            self.pieces = [collect(self.skeleton, name, self.files, self.scratch) for name in blocks]
            self.place = Placement(self.pieces)
            self.order = _order([len(stack.blocks) for stack in self.stacks])
            self.adopt(policy or Policy(depth=0))
            undo.callback(self.let_go)
            self._undo = undo.pop_all()

    def adopt(self, policy: Policy) -> None:
        """From now on run by this policy."""
        self.let_go()
        use_topk(self.model, policy.attention)
        self.policy, resident = policy, self.place(policy.weights).resident
        self.loader = Loader(
            self.model, self.pieces, resident, self.order.after, policy.depth, policy.threads, self._upload()
        )

    def _upload(self) -> Upload | None:
        return None if self.device.type == "cpu" else Upload(self.device)

    def let_go(self) -> None:
        """Have no block's weights in memory until the next `adopt`."""
        if self.loader is not None:
            self.loader.close()
        self.loader = None

    @property
    def config(self) -> Any:
        return self.model.config

    def _load_outside(self) -> None:
        """Embeddings, final norm and head stay in memory; so do the few buffers that a checkpoint may hold."""
        blocks = tuple(f"{name}." for stack in self.stacks for name in stack.blocks)
        buffers = {name for name, _ in self.model.named_buffers()}
        self.skeleton.load(n for n in self.skeleton.stored if not n.startswith(blocks) or n in buffers)
        if self.device.type != "cpu":
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if not tensor.is_meta:
                    tensor.data = tensor.data.to(self.device)

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[Sequence[int]], seed: int | None = None, **generation: Any
    ) -> Iterator[tuple[int, list[int]]]:
        """Generate for token ids; yields (which prompt, its new tokens) as sequences end.

        Prompts of similar length share a batch.  `generation`: the common arguments of transformers' `generate`
        (`max_new_tokens`, `do_sample`, `temperature`, `repetition_penalty`, ...); batch i of the sorted prompts draws
        as after `torch.manual_seed(seed + i)`.  Raises ResourceError for what an offloaded model cannot do.
        """
        settings = Generation.of(self.model, generation, prompt=max(map(len, prompts), default=0))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = self.policy.batch
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        batches = [Batch.of({i: prompts[i] for i in group}, settings) for group in groups]
        yield from self._run(batches, settings, seed)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        **generation: Any,
    ) -> Tensor:
        """transformers' `generate` for the common arguments.

        input_ids int64 [prompts, seq], padded on the left (an encoder's: on the right), and the mask that says where
        -> int64 [prompts, seq + new], an encoder-decoder's [prompts, 1 + new].
        """
        settings = Generation.of(self.model, generation, generation_config, input_ids.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = range(input_ids.shape[0])
        cuts = [rows[at : at + self.policy.batch] for at in range(0, len(rows), self.policy.batch)]
        batches = [Batch(list(cut), input_ids[cut[0] : cut[-1] + 1], mask[cut[0] : cut[-1] + 1]) for cut in cuts]
        found = dict(self._run(batches, settings, seed))
        starts = input_ids if not settings.encoder_decoder else settings.start(len(rows))
        longest = max(map(len, found.values()))
        new = torch.full((len(rows), longest), settings.pad, dtype=torch.long)
        for row, tokens in found.items():
            new[row, : len(tokens)] = torch.tensor(tokens)
        return torch.cat([starts, new], 1)

    def _run(self, batches: Sequence[Batch], settings: Generation, seed: int | None) -> Iterator[tuple[int, list[int]]]:
        longest = max((b.ids.shape[1] for b in batches), default=0) + settings.max_new_tokens
        finished: list[tuple[int, list[int]]] = []
        if self.loader is None:
            raise ResourceError("the offloaded model is closed", "open it again")
        with ExitStack() as stack:
            shelf = self._shelf(longest, stack)
            lanes = (self._lane(i, batch, settings, shelf, finished) for i, batch in enumerate(batches))
            stack.enter_context(halting(self.model, self.stacks))
            for _ in run(lanes, self.policy.batches, self.order, self.loader, shelf, seed):
                yield from finished
                finished.clear()

    def _shelf(self, tokens: int, stack: ExitStack) -> Shelf | None:
        if not self.policy.cache_on_disk:
            return None
        if getattr(self.config, "num_kv_shared_layers", 0):
            raise ResourceError(f"{type(self.model).__name__} shares its cache between layers: keep it in memory")
        shelf = Shelf(self.scratch, tokens)
        stack.callback(shelf.close)
        return shelf

    def _lane(
        self, index: int, batch: Batch, settings: Generation, shelf: Shelf | None, finished: list[tuple[int, list[int]]]
    ) -> Lane:
        prompt = 1 if settings.encoder_decoder else batch.ids.shape[1]
        cache = self._cache(prompt + settings.max_new_tokens)

        def layers(stage: int) -> Sequence[DynamicLayer]:
            on_disk = self.policy.cache_is_on_disk(stage - self.order.stacks[-1][0], self.order.stacks[-1][1])
            return self.cache_layers(cache, stage) if on_disk else ()

        def work(lane: Lane) -> None:
            chunk, keep = self.policy.even_chunk(batch.ids.shape[1]), self._keeping(shelf, cache)
            for row in batch.generate(self.model, cache, settings, keep, self.on_tokens, chunk):
                finished.append(row)

        return Lane(work, index, layers)

    def cache_layers(self, cache: Cache, stage: int) -> list[Any]:
        """The layers of a cache that one stage uses."""
        block = stage - self.order.stacks[-1][0]
        return [part.layers[block] for part in _parts(cache) if 0 <= block < len(part.layers)]

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config(decoder=True).vocab_size)

    def _cache(self, tokens: int | None = None) -> Cache:
        """Of one batch.  tokens: of the decoder's sequences at their end; what is not on disk has room for them."""
        config = self.config.get_text_config(decoder=True)
        if self.policy.cache_bits < 16:
            return CompressedCache.for_model(self.model, self.policy.cache_bits)
        if not self.config.is_encoder_decoder:
            return self._with_room(DynamicCache(config=config), tokens)
        across = None if tokens is None else 0  # written once
        return EncoderDecoderCache(
            self._with_room(DynamicCache(config=config), tokens), self._with_room(DynamicCache(config=config), across)
        )

    def appends(self) -> bool:
        """Whether all layers of its cache only grow: a sliding window loses tokens, and is written anew on disk."""
        if self.config.is_encoder_decoder:
            return False
        return all(type(layer) is DynamicLayer for layer in self._cache().layers)

    def _with_room(self, cache: DynamicCache, tokens: int | None) -> DynamicCache:
        if tokens is None or self.device.type != "cpu":
            return cache
        count = self.order.stacks[-1][1]
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and not self.policy.cache_is_on_disk(i, count):
                cache.layers[i] = RoomLayer(tokens)
        return cache

    def _keeping(self, shelf: Shelf | None, cache: Cache) -> Callable[[Tensor], None]:
        """How to keep only some sequences of a cache, wherever its layers are."""
        count = self.order.stacks[-1][1]

        def keep(rows: Tensor) -> None:
            for part in _parts(cache):
                for i, layer in enumerate(part.layers):
                    there = shelf if self.policy.cache_is_on_disk(i, count) else None
                    if there is not None:
                        there.take([layer])
                    layer.batch_select_indices(rows)
                    if there is not None:
                        there.put([layer])
                        there.settle()  # all of it is written: one layer at a time

        return keep

    def close(self) -> None:
        """Free memory, files and threads."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _in_order(skeleton: Any) -> list[Any]:
    """The stacks that generating runs, the decoder last."""
    found = stacks(skeleton.model)
    config = skeleton.model.config
    if not config.is_encoder_decoder:
        largest = max(found, key=lambda s: len(s.blocks))
        return [largest]
    decoder = skeleton.model.get_decoder()
    inside = {id(m) for m in decoder.modules()}
    return sorted(found, key=lambda s: id(skeleton.model.get_submodule(s.name)) in inside)


def _order(counts: Sequence[int]) -> Order:
    return Order([(sum(counts[:i]), count) for i, count in enumerate(counts)])


def _parts(cache: Cache) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]
