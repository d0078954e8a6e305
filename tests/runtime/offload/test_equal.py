"""Greedy tokens are transformers' own, whatever is placed where and whatever the schedule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hfquant import compress, load
from hfquant.runtime.kv_cache import CompressedCache
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.policy import EVERY_LAYER, Policy
from hfquant.runtime.offload.rooms import RoomLayer
from hfquant.runtime.offload.upload import Upload
from tests.families import FAMILIES, build

NEW = 9
DISTINCT = {"no_repeat_ngram_size": 1}  # random encoder-decoders repeat one token for ever, which says little
DECODERS = ("llama", "llama-tied", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neo", "gpt_neox", "opt", "bloom",
            "mixtral", "qwen3_moe", "phi3")  # fmt: skip
POLICIES = {
    "everything on disk": Policy(batch=2, batches=3, depth=1),
    "row by row": Policy(batch=2, batches=1),
    "one batch": Policy(batch=6, batches=1, depth=0),
    "half the weights": Policy(batch=3, batches=2, weights=120_000),
    "all weights": Policy(batch=2, batches=2, weights=1 << 30),
    "cache on disk": Policy(batch=2, batches=3, cache_on_disk=EVERY_LAYER),
    "some of the cache on disk": Policy(batch=2, batches=3, cache_on_disk=1),
    "some of everything": Policy(batch=2, batches=2, weights=60_000, cache_on_disk=1, depth=0),
    "prompts in chunks": Policy(batch=2, batches=3, chunk=4),
    "chunks and files": Policy(batch=3, batches=2, chunk=3, cache_on_disk=EVERY_LAYER),
    "token by token": Policy(batch=6, batches=1, chunk=1, cache_on_disk=1, depth=0),
    "far ahead": Policy(batch=1, batches=4, cache_on_disk=1, depth=5, threads=3),
}


def prompts(left: bool) -> tuple[Tensor, Tensor]:
    """Six of different lengths, padded."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(6, 11, dtype=torch.long), torch.zeros(6, 11, dtype=torch.long)
    for row, length in enumerate((11, 3, 7, 7, 5, 10)):
        place = slice(11 - length, 11) if left else slice(0, length)
        ids[row, place] = torch.randint(4, 260, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def expected(family: str, folder: Path, **kwargs: Any) -> Tensor:
    made = FAMILIES[family]
    model = getattr(transformers, made.auto).from_pretrained(folder)
    ids, mask = prompts(not made.encoder_decoder)
    kwargs = kwargs | (DISTINCT if made.encoder_decoder else {})
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)


def offloaded(family: str, folder: Path, policy: Policy, **kwargs: Any) -> Tensor:
    ids, mask = prompts(not FAMILIES[family].encoder_decoder)
    kwargs = kwargs | (DISTINCT if FAMILIES[family].encoder_decoder else {})
    with OffloadedModel(folder, policy) as model:
        return model.generate(ids, mask, max_new_tokens=NEW, do_sample=False, **kwargs)


@pytest.mark.parametrize("name", ["everything on disk", "chunks and files"])
@pytest.mark.parametrize("family", DECODERS)
def test_families(family: str, name: str, built: Callable[[str], Path]) -> None:
    assert torch.equal(offloaded(family, built(family), POLICIES[name]), expected(family, built(family)))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "gemma3", "t5", "mixtral", "qwen3_moe"])
def test_policies(family: str, name: str, built: Callable[[str], Path]) -> None:
    assert torch.equal(offloaded(family, built(family), POLICIES[name]), expected(family, built(family)))


@pytest.mark.parametrize("name", ["everything on disk", "cache on disk", "chunks and files"])
@pytest.mark.parametrize("family", ["flan-t5", "bart"])
def test_encoder_decoders(family: str, name: str, built: Callable[[str], Path]) -> None:
    assert torch.equal(offloaded(family, built(family), POLICIES[name]), expected(family, built(family)))


@pytest.mark.parametrize("chunk", [1, 3, 4, 6, 11, 99])
def test_a_prompt_passes_in_even_chunks(
    chunk: int, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of it once, in as many passes as were asked for, whoever leaves its batch later."""
    seen: list[int] = []
    update = RoomLayer.update

    def noted(self: RoomLayer, keys: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(keys.shape[2])
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(RoomLayer, "update", noted)
    ends, layers = some_ends("llama", built("llama")), FAMILIES["llama"].settings["num_hidden_layers"]
    seen.clear()
    offloaded("llama", built("llama"), Policy(batch=6, batches=1, chunk=chunk), eos_token_id=ends, pad_token_id=0)
    passes = seen[::layers]
    first = passes[: -(-11 // chunk)]
    assert sum(first) == 11
    assert max(first) <= chunk
    assert len({*first[:-1]}) <= 1
    assert set(passes[len(first) :]) == {1}


@pytest.mark.parametrize("cache_on_disk", [0, EVERY_LAYER])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_chunks_of_a_prompt_longer_than_the_window(
    family: str, cache_on_disk: int, built: Callable[[str], Path]
) -> None:
    """Of 64 tokens in these two: what leaves it in one chunk is not seen by the next."""
    ids = torch.randint(4, 260, (3, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0  # more than a chunk of padding
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = transformers.AutoModelForCausalLM.from_pretrained(built(family))
    wanted = reference.generate(ids, attention_mask=mask, **settings)
    with OffloadedModel(built(family), Policy(batch=2, batches=2, chunk=25, cache_on_disk=cache_on_disk)) as model:
        assert torch.equal(model.generate(ids, mask, **settings), wanted)


def test_the_tokens_are_worth_comparing(built: Callable[[str], Path]) -> None:
    for family in ("llama", "gpt2", "opt", "gpt_neox", "gemma3", "t5"):
        new = expected(family, built(family))[:, -NEW:]
        assert len(new.unique()) > 5, family
        assert len({tuple(row) for row in new.tolist()}) > 1, family


def some_ends(family: str, folder: Path) -> list[int]:
    """Tokens that some sequences reach early and others do not."""
    new = expected(family, folder)[:, -NEW:]
    return [int(new[0, 2]), int(new[3, 5])]


@pytest.mark.parametrize("cache_on_disk", [0, 1, EVERY_LAYER])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "t5"])
def test_sequences_that_end_leave(family: str, cache_on_disk: int, built: Callable[[str], Path]) -> None:
    ends = some_ends(family, built(family))
    for policy in (Policy(batch=6, batches=1), Policy(batch=4, batches=2)):
        policy = replace(policy, cache_on_disk=cache_on_disk)
        found = offloaded(family, built(family), policy, eos_token_id=ends, pad_token_id=0)
        assert torch.equal(found, expected(family, built(family), eos_token_id=ends, pad_token_id=0))


def test_their_place_in_the_cache_is_free(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    update = RoomLayer.update

    def noted(self: RoomLayer, keys: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(keys.shape[0])
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(RoomLayer, "update", noted)
    ends = some_ends("llama", built("llama"))
    offloaded("llama", built("llama"), Policy(batch=6, batches=1), eos_token_id=ends, pad_token_id=0)
    assert seen[0] == 6
    assert 0 < seen[-1] < 6


@pytest.mark.parametrize("batches", [1, 3])
def test_sampling_draws_what_transformers_draws(batches: int, built: Callable[[str], Path]) -> None:
    folder = built("llama")
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "top_k": 40, "eos_token_id": None}
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids, mask = prompts(True)
    wanted = []
    for i in range(3):
        torch.manual_seed(7 + i)
        rows = slice(2 * i, 2 * i + 2)
        wanted.append(reference.generate(ids[rows], attention_mask=mask[rows], **settings))
    with OffloadedModel(folder, Policy(batch=2, batches=batches)) as model:
        before = torch.get_rng_state()
        found = model.generate(ids, mask, seed=7, **settings)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, torch.cat(wanted))


def test_processors_see_the_whole_text(built: Callable[[str], Path]) -> None:
    ends = some_ends("llama", built("llama"))
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": ends}
    settings |= {"pad_token_id": 0}
    wanted = expected("llama", built("llama"), **settings)
    assert torch.equal(offloaded("llama", built("llama"), Policy(batch=6, batches=1), **settings), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"begin_suppress_tokens": list(range(4, 130))},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"encoder_repetition_penalty": 1.5},
    ],
    ids=lambda s: next(iter(s)),
)
def test_what_counts_from_the_first_new_token(settings: dict[str, Any], built: Callable[[str], Path]) -> None:
    """No sequence leaves its batch then: going on without it would be another first token."""
    new = expected("llama", built("llama"), **settings)[:, -NEW:]
    settings = settings | {"eos_token_id": [int(new[0, 2]), int(new[3, 4])], "pad_token_id": 0}
    wanted = expected("llama", built("llama"), **settings)
    assert torch.equal(offloaded("llama", built("llama"), Policy(batch=6, batches=1), **settings), wanted)


def test_streaming_gives_every_prompt_its_answer(built: Callable[[str], Path]) -> None:
    ids, mask = prompts(True)
    texts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    wanted = expected("llama", built("llama"))[:, 11:].tolist()
    with OffloadedModel(built("llama"), Policy(batch=2, batches=2)) as model:
        found = dict(model.stream(texts, max_new_tokens=NEW, do_sample=False, eos_token_id=None))
        again = dict(model.stream(texts, max_new_tokens=NEW, do_sample=False, eos_token_id=None))
    assert [found[i] for i in range(6)] == wanted
    assert found == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_converted_once(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama", tmp_path, dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)
    ids, mask = prompts(True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = reference.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with OffloadedModel(tmp_path, Policy(batch=6, batches=1), dtype=dtype) as model:
        assert torch.equal(model.generate(ids, mask, max_new_tokens=NEW, do_sample=False), wanted)


@pytest.mark.parametrize("recipe", ["rtn-w4g32", "rtn-w3g32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_compressed_checkpoints(family: str, recipe: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    for _ in compress(built(family), recipe, tmp_path / "out"):
        pass
    ids, mask = prompts(True)
    wanted = load(tmp_path / "out").generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    with OffloadedModel(tmp_path / "out", Policy(batch=6, batches=1, weights=10_000)) as model:
        assert torch.equal(model.generate(ids, mask, max_new_tokens=NEW, do_sample=False), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_compressed_cache_is_the_same_on_disk(
    family: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedCache.for_model, "__defaults__", (4, 3, 4))  # window, group: short texts
    memory = Policy(batch=3, batches=2, cache_bits=4)
    ends = some_ends(family, built(family))
    settings = {"eos_token_id": ends, "pad_token_id": 0}
    found = offloaded(family, built(family), memory, **settings)
    assert torch.equal(found, offloaded(family, built(family), replace(memory, cache_on_disk=EVERY_LAYER), **settings))


@pytest.mark.parametrize("name", ["everything on disk", "half the weights"])
def test_weights_that_are_copied_on(name: str, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps taken for a GPU, with plain copies in the place of its streams."""
    uploads: list[Upload] = []

    def upload(self: OffloadedModel) -> Upload:
        uploads.append(Upload(self.device))
        return uploads[-1]

    monkeypatch.setattr(OffloadedModel, "_upload", upload)
    found = offloaded("llama", built("llama"), POLICIES[name])
    assert uploads
    assert torch.equal(found, expected("llama", built("llama")))
