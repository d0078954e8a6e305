"""The cost model and the search, on made-up measurements whose best answer is known."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hfquant.errors import ResourceError
from hfquant.runtime.offload import planning, scratch
from hfquant.runtime.offload.cost import CostModel, Workload
from hfquant.runtime.offload.fit import Curve
from hfquant.runtime.offload.hardware import Hardware, profile
from hfquant.runtime.offload.measured import Feed, Measured
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.pieces import Piece, aligned
from hfquant.runtime.offload.placement import Placement
from hfquant.runtime.offload.policy import Policy
from hfquant.runtime.offload.probe import Chunk, Probe, Step
from hfquant.runtime.offload.reader import Handle
from hfquant.runtime.offload.solve import solve

MB = 1_000_000
MACHINE = Hardware("test", 2, 0, 1e9, 0.5e9, 0.2, 5e9, 1e11, 1e11, 1e10, 0, 0)
BASE = 400 * MB
LAYERS = 20


def stages(layers: int = LAYERS, stored: torch.dtype = torch.float32) -> list[list[Piece]]:
    """Layers of 48 MB: eight matrices and a norm."""
    shapes = [(1000, 1500)] * 8 + [(16,)]
    return [
        [Piece(f"{i}.{j}", torch.float32, s, Handle(0), 0, stored) for j, s in enumerate(shapes)] for i in range(layers)
    ]


def per_row(rows: float) -> float:
    """Seconds of a block: few rows cost nearly as much as many."""
    return 5e-3 + 2e-4 * rows


def measured(batch: int, prompt: int) -> Probe:
    tokens = batch * prompt
    first = Step(per_row(tokens) + 1e-6 * tokens * prompt, 1e-3, 4000 * tokens, 12000 * tokens, 0)
    later = Step(per_row(batch) + 1e-6 * tokens, 1e-3, 4000 * batch, 12000 * batch, 0)
    return Probe(batch, prompt, first, later, 4096 * tokens, 4096, 2)


def part(batch: int, chunk: int, past: int) -> Chunk:
    tokens, pairs = batch * chunk, batch * chunk * past
    seconds = per_row(tokens) + 1e-6 * tokens * chunk + 2e-7 * batch * past + 2e-6 * pairs
    return Chunk(batch, chunk, past, seconds, 4000 * tokens + pairs, 12000 * tokens + 5000 * batch * past + 2 * pairs)


def model(
    seconds: float = 1e-9, stored: torch.dtype = torch.float32, cut: bool = True, appends: bool = False
) -> CostModel:
    probes = [measured(1, 64), measured(2, 64), *(measured(b, 4) for b in (1, 4, 16, 64))]
    contexts = [(b, 64, per_row(b) + 1e-6 * b * 64) for b in (1, 4, 16)]
    shelved = 4, 64, per_row(4) + 3e-6 * 4 * 64
    chunks = [part(4, 4, 64), part(16, 4, 32), part(16, 8, 64), part(4, 16, 64)] if cut else []
    data = Measured(probes, contexts, Feed(seconds, 0.2 * seconds, 0.1 * seconds), shelved, chunks)
    return CostModel(MACHINE, data, stages(stored=stored), LAYERS, BASE, appends)


WORK = Workload(prompts=64, prompt=64, new=32)


@pytest.mark.parametrize("room", [0, 5 * MB, 7 * MB, 100 * MB, 961 * MB, 10_000 * MB])
def test_placement_is_exact(room: int) -> None:
    pieces = stages()
    placed = Placement(pieces)(room)
    total = sum(aligned(p.nbytes) for stage in pieces for p in stage)
    assert placed.kept == sum(aligned(p.nbytes) for stage in pieces for p in stage if p.name in placed.resident)
    assert placed.kept <= room
    assert placed.kept > min(room, total) - 6 * MB - 64, "no other tensor would have fitted"
    left = [sum(p.nbytes for p in stage if p.name not in placed.resident) for stage in pieces]
    assert list(placed.per_stage) == left
    assert max(left) - min(left) <= 6 * MB + 64
    assert max(left) <= placed.largest <= max(left) + 64 * 9


def test_what_is_stored_narrower_is_read_as_such() -> None:
    placed = Placement(stages(stored=torch.bfloat16))(100 * MB)
    assert placed.read_once * 2 == pytest.approx(placed.kept, rel=1e-3)
    wide, narrow = model(), model(stored=torch.bfloat16)
    passes = [cost.predict(Policy(1, 1, 0), WORK).decode.disk for cost in (wide, narrow)]
    assert passes[0] == pytest.approx(2 * passes[1])


def test_the_fit_gives_back_what_was_measured() -> None:
    cost = model()
    for batch, prompt in ((1, 64), (2, 64), (16, 4)):
        probe = measured(batch, prompt)
        assert cost.prefill(batch, prompt) == pytest.approx(probe.prefill.block, rel=0.02)
        assert cost.decode(batch, prompt) == pytest.approx(probe.decode.block, rel=0.02)
    assert cost.prefill(32, 64) == pytest.approx(measured(32, 64).prefill.block, rel=0.05), "beyond what was measured"
    assert cost.cache(8, 32) == pytest.approx(4096 * 8 * 32)
    assert cost.shelving == pytest.approx(2e-6, rel=0.05)


@pytest.mark.parametrize(("batch", "chunk", "past"), [(4, 16, 64), (16, 8, 64), (8, 8, 48), (32, 16, 128)])
def test_a_chunk_costs_what_was_measured(batch: int, chunk: int, past: int) -> None:
    cost, wanted = model(), part(batch, chunk, past)
    assert cost.chunked(batch, chunk, past) == pytest.approx(wanted.block, rel=0.03)
    tokens = 1, batch * chunk, batch * chunk**2
    assert cost.held(*tokens) + cost.held_past(batch * past, batch * chunk * past) == pytest.approx(wanted.held, 0.02)
    assert cost.work(*tokens) + cost.work_past(batch * past, batch * chunk * past) == pytest.approx(wanted.work, 0.02)


def test_every_chunk_reads_the_weights_and_is_as_large_as_it_is() -> None:
    cost, work = model(), replace(WORK, prompt=60)
    whole, cut = (Policy(16, 2, 0, LAYERS, chunk=chunk) for chunk in (None, 16))
    a, b = cost.predict(whole, work), cost.predict(cut, work)
    stored = 2 * LAYERS * cost.cache(16, 60) / MACHINE.disk_write
    again = 2 * LAYERS * sum(cost.cache(16, past) for past in (15, 30, 45)) / MACHINE.disk_read
    assert a.prefill.disk == pytest.approx(LAYERS * 48e6 * 1e-9 + stored, rel=1e-3)
    assert b.prefill.disk == pytest.approx(4 * LAYERS * 48e6 * 1e-9 + stored + again, rel=1e-3)
    assert b.prefill.compute > a.prefill.compute
    assert b.decode == a.decode
    assert cost.lanes(cut, work) < 0.7 * cost.lanes(whole, work)
    assert cost.predict(replace(whole, chunk=60), work) == a


def test_chunks_make_room_for_batches_that_are_fast() -> None:
    """Where a whole prompt of many is too large, and one token of each is not."""
    work = Workload(prompts=256, prompt=256, new=64)
    cut, whole = (solve(model(cut=cut), work, 640 * MB) for cut in (True, False))
    assert cut.policy.chunk is not None
    assert cut.policy.batch > whole.policy.batch
    assert cut.prediction.seconds < 0.95 * whole.prediction.seconds
    assert cut.prediction.peak <= 640 * MB
    roomy = solve(model(), work, 100_000 * MB)
    assert roomy.policy.chunk is None, "it brings nothing where there is room"


def test_a_compressed_cache_is_not_cut_unasked() -> None:
    work = Workload(prompts=256, prompt=256, new=64)
    assert solve(model(), work, 640 * MB, like=Policy(cache_bits=4)).policy.chunk is None


def test_the_longest_prompt_may_need_to_be_cut() -> None:
    work = Workload(1, 8192, 4)
    least = [model(cut=cut).peak(Policy(1, 1, 0, LAYERS, depth=0, chunk=512 if cut else None), work) for cut in (1, 0)]
    assert least[0] < least[1] - 50 * MB
    solved = solve(model(), work, (least[0] + least[1]) // 2)
    assert solved.policy.chunk is not None
    with pytest.raises(ResourceError, match="needs at least"):
        solve(model(cut=False), work, (least[0] + least[1]) // 2)


def test_a_compressed_cache_keeps_its_window_in_full() -> None:
    cost = model()
    assert cost.cache(1, 64, 4) == cost.cache(1, 64)
    assert cost.cache(1, 64 + 640, 4) == pytest.approx(4096 * (64 + 640 * 4.5 / 16))


@pytest.mark.parametrize(("batch", "batches"), [(4, 1), (8, 3)])
def test_the_cache_on_its_way_is_counted(batch: int, batches: int) -> None:
    """The layer that runs, half of it while it grows, the one read ahead; all of it again where it is written anew."""
    plain, disk = Policy(batch, batches), Policy(batch, batches, cache_on_disk=LAYERS)
    work = Workload(batch * batches, 8, 64)  # the last token is the largest moment
    layer, token = 4096 * batch * 71, 4096 * batch
    for cost, wanted in ((model(appends=True), 2.5 * layer + 2 * token), (model(), 4 * (layer + token))):
        held = cost.lanes(disk, work) - cost.lanes(plain, work)
        assert held == pytest.approx(wanted - LAYERS * batches * (layer + token), rel=1e-6)


def test_a_curve_goes_through_its_points_and_never_falls() -> None:
    curve = Curve([(1, 2.0), (4, 1.5), (8, 3.0), (16, 5.0), (1, 1.0)])
    assert [curve(x) for x in (0, 1, 4, 6, 8, 16)] == pytest.approx([1.0, 1.0, 1.5, 2.25, 3.0, 5.0])
    assert curve(32) == pytest.approx(5.0 + 16 * 0.25)
    assert Curve([(0.0, 0.0)])(1000) == 0


def test_time_is_the_slowest_resource() -> None:
    cost = model()
    small = cost.predict(Policy(1, 1, 0, depth=2), WORK)
    assert small.decode.bottleneck == "disk"
    assert small.decode.seconds == pytest.approx(0.96, rel=0.02)  # 20 layers of 48 MB at 1 GB/s
    alone = cost.predict(Policy(1, 1, 0, depth=0), WORK)
    assert alone.decode.seconds == pytest.approx(small.decode.seconds + 20 * per_row(1), rel=0.05)
    large = cost.predict(Policy(64, 1, 10_000 * MB), WORK)
    assert large.decode.bottleneck in ("compute", "processor")
    assert large.decode.disk == 0
    assert large.start == pytest.approx(0.96, rel=0.02)


def test_the_rest_of_the_prompts_is_a_smaller_block() -> None:
    cost = model()
    policy = Policy(8, 4, 0)
    whole, more = (cost.predict(policy, replace(WORK, prompts=n)).seconds for n in (64, 72))
    rest = cost.predict(Policy(8, 1, 0), replace(WORK, prompts=8)).seconds
    assert more == pytest.approx(whole + rest)


@pytest.mark.parametrize("memory", [700 * MB, 900 * MB, 4000 * MB])
def test_the_budget_is_kept_and_no_sweep_finds_better(memory: int) -> None:
    cost = model()
    best = solve(cost, WORK, memory)
    assert best.prediction.peak <= memory
    sweep = [0.0]
    for batch in (1, 2, 4, 8, 16, 24, 32, 48, 64):
        for batches in range(1, -(-64 // batch) + 1):
            for on_disk in (0, 5, 10, 15, 20):
                for depth in (0, 1):
                    policy = Policy(batch, batches, 0, on_disk, 16, depth)
                    room = memory - cost.peak(policy, WORK)
                    if room >= 0:
                        policy = replace(policy, weights=room)
                        sweep.append(cost.predict(policy, WORK).tokens_per_second)
    assert best.prediction.tokens_per_second > 0.9 * max(sweep)


def test_more_memory_is_never_slower() -> None:
    cost = model()
    speeds = [solve(cost, WORK, memory * MB).prediction.tokens_per_second for memory in (650, 800, 1000, 1400, 3000)]
    assert all(b >= 0.98 * a for a, b in pairwise(speeds))
    assert speeds[-1] > 1.2 * speeds[0]


def test_sharing_a_load_is_what_makes_it_fast() -> None:
    cost = model()
    shared, alone = (cost.predict(Policy(4, n, 0), WORK).tokens_per_second for n in (16, 1))
    assert shared > 5 * alone


def test_a_latency_bound_is_kept() -> None:
    cost = model()
    free = solve(cost, WORK, 1000 * MB)
    bound = 0.7 * free.prediction.latency
    assert solve(cost, WORK, 1000 * MB, latency=bound).prediction.latency <= bound
    with pytest.raises(ResourceError, match="no policy answers"):
        solve(cost, WORK, 1000 * MB, latency=0.01)


def test_a_full_disk_keeps_the_cache_in_memory() -> None:
    assert solve(model(), WORK, 900 * MB, disk=0).policy.cache_on_disk == 0


def test_too_little_disk_is_not_said_to_be_memory() -> None:
    """Memory for the model, not for the cache; no disk for it either."""
    cost, long = model(), Workload(1, 64, 8192)
    needed = cost.peak(Policy(1, 1, 0, LAYERS, 16, 0), long)
    assert solve(cost, long, needed).policy.cache_on_disk == LAYERS
    with pytest.raises(ResourceError, match=r"MB of disk(.|\n)*there are 0 MB(.|\n)*--disk"):
        solve(cost, long, needed, disk=0)


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(ResourceError, match=r"needs at least (\d+) MB") as caught:
        solve(model(), WORK, BASE)
    needed = int(caught.value.message.split("at least ")[1].split(" ")[0].replace(",", ""))
    assert solve(model(), WORK, (needed + 1) * MB).prediction.peak <= (needed + 1) * MB


@pytest.mark.parametrize(
    "numbers", [{"batch": 0}, {"batches": 0}, {"depth": -1}, {"threads": 0}, {"cache_bits": 5}, {"chunk": 0}]
)
def test_policies_that_make_no_sense_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(ResourceError, match=next(iter(numbers)).removeprefix("cache_")):
        Policy(**numbers)


def test_planning_does_not_change_what_is_sampled(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    with OffloadedModel(built("llama")) as opened:
        before = torch.get_rng_state()
        planning.plan_offload(opened, Workload(2, 8, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_container_gets_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "most_memory", lambda: 100 * MB)
    assert planning._available() == 100 * MB
    monkeypatch.setattr(planning, "most_memory", lambda: None)
    assert planning._available() > 100 * MB


@pytest.mark.parametrize(
    ("memory", "chosen"), [([], "/quick"), (["/quick"], "/var/tmp"), (["/quick", "/var"], "/quick")]
)
def test_temporary_files_are_on_a_disk(memory: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a folder whose files lie in memory, if there is another."""
    parts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    parts += [SimpleNamespace(mountpoint=m, fstype="tmpfs") for m in memory]
    monkeypatch.setattr(scratch.psutil, "disk_partitions", lambda all: parts)
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: "/quick")
    assert scratch.Scratch().folder == Path(chosen)


def test_a_profile_that_cannot_be_remembered_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    assert profile(tmp_path).disk_read > 1e6


def test_the_profile_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    first = profile(tmp_path)
    assert min(first.disk_read, first.disk_write, first.copy, first.attention, first.matmul_half, first.matmul) > 1e6
    assert profile(tmp_path) == first
    assert profile(tmp_path, fresh=True) != first


@pytest.mark.parametrize("left", ["{", "[1]", '{"key": {"at": 9e9, "measured": {"matmul": 1.0, "unheard_of": 2.0}}}'])
def test_what_another_version_remembered_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    first = profile(tmp_path)
    file = tmp_path / "hfquant" / "hardware.json"
    file.write_text(left.replace("key", next(iter(json.loads(file.read_text())))))
    assert profile(tmp_path).cores == first.cores
    assert profile(tmp_path) == profile(tmp_path)
