"""Several work on a block: the same bytes however many they are, and what one alone would have found."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from hfquant import report
from hfquant.compress import compress, layout
from hfquant.compress.activations import Stream
from hfquant.compress.crew import PARTS, Devices, Job
from hfquant.compress.observe import discover
from hfquant.compress.shards import cut
from hfquant.compress.streaming import Passage, Streamer
from hfquant.compress.together import observe, record_original
from hfquant.errors import CheckpointError, ResourceError
from hfquant.model.blocks import weights
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from tests.compress.folders import digests

CALIBRATION = {"samples": 24, "seq_len": 32}


class Counted(Devices):
    """Notes how many parts each job had."""

    def __init__(self, count: int, parts: int = PARTS) -> None:
        super().__init__(["cpu"] * count, parts)
        self.jobs: dict[str, list[int]] = {}

    def each(self, job: Job, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
        todo = list(parts)
        self.jobs.setdefault(job.__name__, []).append(len(todo))
        return super().each(job, shared, todo, stay)


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("samples", [1, 5, 24])
def test_shards_are_all_of_it_and_much_alike(samples: int, parts: int) -> None:
    batches = [(at, 1) for at in range(samples)]
    shards = cut(batches, parts)
    assert [i for shard in shards for i in shard] == list(range(samples))
    sizes = [len(shard) for shard in shards]
    assert len(shards) == min(parts, samples)
    assert max(sizes) - min(sizes) <= 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_sums_and_outputs_are_those_of_one_alone(family: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    tokens = torch.randint(4, 260, (9, 24), generator=torch.Generator().manual_seed(0))
    streamer = Streamer(Skeleton(open_source(built(family)), torch.float32), tokens, tmp_path, batch=2)
    passage = next(streamer.passages())
    block = streamer.skeleton.load_module(passage.stack.blocks[0])
    groups = discover(block, passage, 0, weights(block))
    shape = passage.stream.shape
    before = Stream(tmp_path / "before", 9, shape, torch.float32)
    before.write(0, passage.stream.read(0, 9) * 1.1)
    experts = {g: range(g.members[0].experts(block)) for g in groups}

    def work() -> tuple[Any, torch.Tensor, torch.Tensor]:
        after = Stream(tmp_path / "after", 9, shape, torch.float32)
        inputs = record_original(block, passage, 0, groups, before, after)
        seen = observe(block, passage, 0, groups, inputs, experts, further=True)
        ahead, passage.ahead = passage.ahead, None
        out = passage.run(block, 0, tmp_path / "out").read(0, 9)
        assert ahead is not None
        assert torch.equal(ahead.read(0, 9), out), "it was run to its end meanwhile"
        return seen, after.read(0, 9), out

    alone, crews = work(), []
    for count in (1, 2, 3):
        passage.crew, passage.shards = Devices(["cpu"] * count, parts=4), None
        crews.append(work())
    for seen, after, out in crews:
        assert seen.keys() == alone[0].keys()
        for key, statistics in seen.items():
            assert statistics.tokens == alone[0][key].tokens
            for mine, one, first in (
                (statistics.H, alone[0][key].H, crews[0][0][key].H),
                (statistics.C, alone[0][key].C, crews[0][0][key].C),
            ):
                assert (mine is None) == (one is None)
                if mine is not None and one is not None:
                    torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-5)
                    assert torch.equal(mine, first)
        torch.testing.assert_close(after, alone[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, alone[2], rtol=1e-5, atol=1e-5)
    assert alone[0][groups[0], 0].C is not None


RECIPES = [
    ("llama", "gptq-w4g32"),
    ("llama", "sparsegpt-2of4+gptq-w4g32+lorc-r4"),
    ("llama", "smoothquant-w8a8"),
    ("mixtral", "gptq-w4g32"),
    ("t5", "gptq-w4g32"),
]


@pytest.mark.parametrize(("family", "recipe"), RECIPES)
def test_any_number_ends_in_the_same_bytes(
    family: str, recipe: str, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what depends on the sizes of batches is not the crew's doing: rounding of bfloat16, samples that a search looks at
    monkeypatch.setattr(layout, "compute_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(layout, "largest_batch", lambda *_: 3)
    results = []
    for count in (1, 3):
        crew = Counted(count)
        list(compress(built(family), recipe, tmp_path / str(count), crew=crew, **CALIBRATION))
        results.append(digests(tmp_path / str(count)))
        assert max(crew.jobs["_outputs"]) == PARTS
        assert max(crew.jobs["_solve"]) > 1, "a block's weights are solved side by side"
    assert results[0] == results[1]
    list(compress(built(family), recipe, tmp_path / "alone", **CALIBRATION))
    alone, crewed = (
        {row["name"]: row["error"] for row in report.read(tmp_path / name)["layers"]} for name in ("alone", "3")
    )
    assert alone.keys() == crewed.keys()
    for name, error in alone.items():  # a sum that differs in its last digit turns a few codes, and all that follows
        assert crewed[name] == pytest.approx(error, rel=0.1), name
    assert fmean(crewed.values()) == pytest.approx(fmean(alone.values()), rel=0.01)


def test_a_run_goes_on_with_another_number_but_not_with_other_parts(
    built: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    list(compress(built("llama"), "gptq-w4g32", whole, crew=Devices(["cpu"]), **CALIBRATION))
    begun = compress(built("llama"), "gptq-w4g32", broken, crew=Devices(["cpu"]), **CALIBRATION)
    for _ in range(10):  # into the second block
        next(begun)
    begun.close()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="parts"):
        compress(built("llama"), "gptq-w4g32", broken, **CALIBRATION)
    list(compress(built("llama"), "gptq-w4g32", broken, crew=Devices(["cpu", "cpu"]), **CALIBRATION))
    assert digests(broken) == digests(whole)
    assert report.read(broken)["compression"]["resumed"] == 1


def test_an_error_of_one_ends_the_work_of_all() -> None:
    def job(device: str, shared: int, part: int) -> int:
        if part == 3:
            raise ResourceError("the third fails")
        return shared + part

    crew, found = Devices(["cpu", "cpu"]), list[int]()
    values = crew.each(job, 10, ((part,) for part in range(8)))
    with pytest.raises(ResourceError, match="third"):
        found.extend(values)
    assert found == [10, 11, 12]


def test_crews_that_are_none_are_refused() -> None:
    with pytest.raises(ResourceError, match="two parts"):
        Devices(["cpu"], parts=1)
    with pytest.raises(ResourceError, match="one kind"):
        Devices(["cpu", "cuda:0"])


def test_a_passage_that_is_handed_on_needs_no_file(built: Callable[[str], Path], tmp_path: Path) -> None:
    import pickle

    from hfquant.compress.shards import excerpt

    tokens = torch.randint(4, 260, (6, 24), generator=torch.Generator().manual_seed(0))
    streamer = Streamer(Skeleton(open_source(built("t5")), torch.float32), tokens, tmp_path / "work", batch=2)
    passages = streamer.passages()
    first: Passage = next(passages)
    part = excerpt(first, 1, range(1, 3))
    wanted = [first.arguments(1, batch) for batch in (1, 2)]
    sent = pickle.loads(pickle.dumps(part))
    for f in (tmp_path / "work").rglob("*"):
        f.unlink() if f.is_file() else None
    for batch, (args, kwargs) in enumerate(wanted):
        got_args, got_kwargs = sent.arguments(1, batch)
        assert torch.equal(
            got_args[0] if got_args else got_kwargs["hidden_states"], args[0] if args else kwargs["hidden_states"]
        )
        assert got_kwargs.keys() == kwargs.keys()
