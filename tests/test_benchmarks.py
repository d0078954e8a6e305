"""Benchmarks are run by hand: here is seen that what they import is there, and what of them needs no GPU."""

from pathlib import Path

import pytest

from tests.processes import fresh

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert "quality" in names
    code = f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(FOLDER)!r})\n" + "\n".join(
        f"import {name}" for name in names
    )
    (done,) = fresh(code)
    assert done.code == 0, done.err


def test_sizes_that_were_measured_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import gpu_tune

    from hfquant.runtime.kernels.triton import configs

    gpu, shape = configs.Gpu("Some GPU", 90, 132), (4096, 4096)
    configs.tuned.cache_clear()
    tried = list(gpu_tune.sizes(gpu, 4, 16, shape, 32))
    shipped = configs.choose(gpu, "planes", 4, 16, shape, 32)
    assert tried[0] == shipped
    assert len(set(tried)) == len(tried) > 20

    def time(config: configs.Config) -> float:
        if config.stages == 4:
            raise RuntimeError("out of resource: shared memory")
        return abs(config.split - 8) + abs(config.outs - 64) + config.warps + config.stages

    best, taken = gpu_tune.fastest(iter(tried), time)
    assert best == configs.Config(tried[0].rows, 64, 4, 2, 8)
    assert all((seconds == float("inf")) == (config.stages == 4) for config, seconds in taken.items())
    configs.remember(gpu.name, {configs.key("planes", 4, 16, shape): best})
    assert configs.choose(gpu, "planes", 4, 16, shape, 32) == best != shipped
    assert configs.choose(gpu, "planes", 4, 1, shape, 32) != best
    configs.tuned.cache_clear()


def test_rivals_that_are_not_there_are_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_rivals

    found, missing = gpu_rivals.rivals()
    assert {*found, *missing} == {"gemlite W4A16", "Humming W4A16"}
    assert all(reason for reason in missing.values())
    codes, scale = gpu_rivals._weights(8, 256, 0)
    W = gpu_rivals._dense(codes, scale)
    assert W.shape == (8, 256)
    monkeypatch.setattr("torch.Tensor.cuda", lambda self: self)
    gpu_rivals.check("right", lambda x: (x.float() @ W.T).bfloat16(), W)
    with pytest.raises(AssertionError, match="wrong is wrong"):
        gpu_rivals.check("wrong", lambda x: (x.float() @ W.T * 1.1).bfloat16(), W)
