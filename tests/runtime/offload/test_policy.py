"""The cost model and the search, on made-up measurements whose best answer is known."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hfquant.errors import ResourceError
from hfquant.runtime.offload.cost import CostModel, Workload
from hfquant.runtime.offload.hardware import Hardware, profile
from hfquant.runtime.offload.pieces import Piece
from hfquant.runtime.offload.placement import choose, kept, largest_streamed
from hfquant.runtime.offload.policy import Policy
from hfquant.runtime.offload.probe import Probe, Step
from hfquant.runtime.offload.solve import solve

MB = 1_000_000
MACHINE = Hardware("test", 2, 0, 1e9, 0.5e9, 2e9, 0.2, 0.5, 5e9, 1e11)
BASE = 400 * MB
LAYERS = 20


def stages(layers: int = LAYERS) -> list[list[Piece]]:
    """Layers of 48 MB: eight matrices and a norm."""
    shapes = [(1000, 1500)] * 8 + [(16,)]
    return [[Piece(f"{i}.{j}", torch.float32, s, 0, 0) for j, s in enumerate(shapes)] for i in range(layers)]


def measured(batch: int, prompt: int) -> Probe:
    tokens = batch * prompt
    first = Step(1e-3 + 2e-4 * tokens, 1e-3, 4000 * tokens, 12000 * tokens, 0)
    later = Step(1e-3 + 2e-4 * batch, 1e-3, 4000 * batch, 12000 * batch, 0)
    return Probe(batch, prompt, first, later, 4096 * tokens)


def model(cached: bool = False) -> CostModel:
    probes = [measured(1, 64), measured(2, 64), measured(4, 8), measured(16, 8)]
    return CostModel(MACHINE, probes, stages(), LAYERS, BASE, cached)


WORK = Workload(prompts=64, prompt=64, new=32)


@pytest.mark.parametrize("room", [0, 5 * MB, 7 * MB, 100 * MB, 961 * MB, 10_000 * MB])
def test_placement_is_exact(room: int) -> None:
    pieces = stages()
    chosen = choose(pieces, room)
    total = kept(pieces, frozenset(p.name for stage in pieces for p in stage))
    assert kept(pieces, chosen) <= room
    assert kept(pieces, chosen) > min(room, total) - 6 * MB - 64, "no other tensor would have fitted"
    left = [sum(p.nbytes for p in stage if p.name not in chosen) for stage in pieces]
    assert max(left) - min(left) <= 6 * MB + 64
    assert largest_streamed(pieces, chosen) <= max(left) + 64 * 9


def test_the_fit_gives_back_what_was_measured() -> None:
    cost, b, s = model(), 8, 32
    assert cost.prefill(1, b * s, b * s * s) == pytest.approx(1e-3 + 2e-4 * b * s, rel=0.02)
    assert cost.decode(1, b, b * s) == pytest.approx(1e-3 + 2e-4 * b, rel=0.02)
    assert cost.cache(b, s) == pytest.approx(4096 * b * s)


def test_time_is_the_slowest_resource() -> None:
    cost = model()
    small = cost.predict(Policy(1, 1, 0, depth=2), WORK)
    assert small.decode.bottleneck == "disk"
    assert small.decode.seconds == pytest.approx(0.96, rel=0.02)  # 20 layers of 48 MB at 1 GB/s
    large = cost.predict(Policy(64, 1, 10_000 * MB), WORK)
    assert large.decode.bottleneck in ("compute", "processor")
    assert large.decode.disk == 0


@pytest.mark.parametrize("memory", [700 * MB, 900 * MB, 1500 * MB, 4000 * MB])
def test_the_budget_is_kept_and_no_sweep_finds_better(memory: int) -> None:
    cost = model()
    best = solve(cost, WORK, memory)
    assert best.prediction.peak <= memory
    sweep = [0.0]
    for batch in (1, 2, 4, 8, 16, 24, 32, 48, 64):
        for batches in range(1, -(-64 // batch) + 1):
            for on_disk in (0, 5, 10, 15, 20):
                for depth in (1, 2):
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


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(ResourceError, match=r"needs at least (\d+) MB") as caught:
        solve(model(), WORK, BASE)
    needed = int(caught.value.message.split("at least ")[1].split(" ")[0].replace(",", ""))
    assert solve(model(), WORK, (needed + 1) * MB).prediction.peak <= (needed + 1) * MB


def test_the_profile_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hfquant.runtime.offload.hardware.SAMPLE", 8 << 20)
    first = profile(tmp_path)
    assert min(first.disk_read, first.disk_write, first.cached_read, first.copy, first.matmul) > 1e6
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
