"""`hfquant bench`: what runs, how much of it, beside its original.  Of times, that they are there and consistent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hfquant
from hfquant import report
from hfquant.cli import app
from hfquant.compress import compress
from hfquant.errors import KernelError, RecipeError
from hfquant.measure import bench as module
from hfquant.measure.bench import Bench, bench
from hfquant.runtime import kernels

from .models import save, tiny

RECIPE = {"steps": [{"method": "rtn", "search": 0}], "grid": "w5g16", "dtype": "keep"}
QUICK = {"prompt": 12, "new_tokens": 4, "rounds": 1}
SHAPES = {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}  # q and o, k and v, gate and up, down; of two blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and what a recipe makes of it."""
    folder = tmp_path_factory.mktemp("bench")
    source, out = save(tiny(), folder / "source"), folder / "out"
    list(compress(source, RECIPE, out))
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return source, out


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWEEP", 1 << 20)


def consistent(done: Bench) -> bool:
    rest = done.compressed.decode * done.bytes_per_token / done.bandwidth
    speeds = [done.compressed.prefill, done.compressed.decode, done.bandwidth]
    return done.share == rest and all(speed > 0 for speed in speeds)


def test_beside_the_original(folders: tuple[Path, Path]) -> None:
    """Kernels of every shape, the bytes that a token is multiplied by, memory; all of it into the report if asked."""
    source, out = folders
    done = bench(out, against=source, mode="reference", into_report=True, **QUICK)
    assert consistent(done)
    assert done.original is not None
    assert done.original.prefill > 0 < done.original.decode
    assert {kind.shape: kind.layers for kind in done.kinds} == SHAPES
    assert {(kind.decode, kind.prefill) for kind in done.kinds} == {("reference", "reference")}
    model = hfquant.load(out)
    every = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    table = model.get_input_embeddings().weight
    shared = table is model.get_output_embeddings().weight
    assert done.bytes_per_token == every - (0 if shared else table.nbytes)
    assert done.memory["stored"] + done.memory["other"] == every
    assert done.settings["kernels"] == "reference"
    assert done.settings["threads"] == torch.get_num_threads()
    assert report.read(out)["bench"] == json.loads(json.dumps(done.to_dict()))


def test_the_kernels_are_those_that_run(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the dispatcher chose them while tokens went through."""
    ran: set[tuple[str, int]] = set()
    usual = kernels.choose

    def choose(x: torch.Tensor, matrix: kernels.Matrix) -> kernels.Choice:
        choice = usual(x, matrix)
        ran.add((choice.kernel.name, x.shape[0]))
        return choice

    monkeypatch.setattr(kernels, "choose", choose)
    done = bench(folders[1], mode="auto", **QUICK)
    assert done.original is None or done.original.decode > 0
    assert {(kind.decode, 1) for kind in done.kinds} | {(kind.prefill, 12) for kind in done.kinds} == ran
    assert all(kind.decode not in kind.refused for kind in done.kinds)


def test_the_command(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = folders
    seen: dict[str, object] = {}
    run: Callable[..., Bench] = module.bench

    def remember(*args: object, **settings: object) -> Bench:
        seen.update(settings)
        return run(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "bench", remember)
    options = ["bench", str(out), "--against", str(source), "--prompt", "12", "--new-tokens", "4", "--rounds", "1"]
    done = CliRunner().invoke(app, [*options, "--kernels", "exact", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["kernels"] == seen["mode"] == "exact"
    assert found["share_of_bandwidth"] > 0
    told = CliRunner().invoke(app, options)
    assert told.exit_code == 0, told.output
    assert "48 x 32" in told.stdout
    assert "of the limit" in told.stdout
    assert "original" in told.stdout


def test_what_cannot_be_measured_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"60 \+ 32 tokens are more than the model's 64 positions"):
        bench(folders[1], prompt=60)
    with pytest.raises(KernelError, match=r"no kernel `exakt`(.|\n)*`exact`"):
        bench(folders[1], mode="exakt")
