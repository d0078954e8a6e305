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


def test_one_grid_everywhere_is_the_grid_whose_bits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from budget_report import as_recipe, uniform_grids

    from hfquant.budget.table import Option
    from hfquant.recipe import Recipe

    names = uniform_grids((32, 64, 128))
    assert {"w2g64sym", "w2g64", "w4g64sym"} <= {*names}
    for name in names:
        grid = Recipe.parse({"steps": [{"method": "gptq"}], "grid": as_recipe(name)}).grid
        assert Option(grid, nbytes=1, data=1, loss=0.0).name == name


def test_a_choice_that_mixes_blindly_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the line between two grids, by the loss itself; less than nothing where its logarithm is interpolated."""
    monkeypatch.syspath_prepend(str(FOLDER))
    from budget_report import AVERAGES, gains

    uniform = [{"bits": 2.0, "kl": 1.0, "growth": 1.0}, {"bits": 5.0, "kl": 0.1, "growth": 0.1}]
    chosen = [{"asked": at, "bits": at, "kl": 1 - 0.3 * (at - 2), "growth": 0.2} for at in AVERAGES]
    for row in gains(uniform, chosen):
        assert row["kl_blind_less"] == pytest.approx(0)
        assert row["kl_uniform"] == pytest.approx(10 ** -((row["average"] - 2) / 3))
        assert row["kl_uniform_less"] < 0
