"""What was compiled is kept, and not trusted blindly; what cannot be compiled does not stop a model."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("llvmlite")

from hfquant.llvm import engine, machine
from hfquant.llvm.threads import pool
from hfquant.runtime import kernels
from hfquant.runtime.llvm import call, compiled, memory
from hfquant.runtime.llvm.codes import Tile
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid

from ..rounding import random

here = machine.level()
pytestmark = pytest.mark.skipif(here is None, reason="needs AVX2")


def layer_of(out: int = 48, columns: int = 192, bits: int = 4) -> QLinear:
    return QLinear.from_quantized(random(out, columns, Grid(bits, 64)), None, formats.load("native"), torch.float32)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A process that has compiled nothing, with an empty cache; the list grows with everything that is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(engine, "_ADDRESSES", {})
    monkeypatch.setattr(kernels, "_BROKEN", {})
    made: list[str] = []
    compile = engine.compile
    monkeypatch.setattr(engine, "compile", lambda *a: made.append("compiled") or compile(*a))
    with kernels.mode("cpu_int8"):
        yield made


def packing() -> int:
    """The cheapest function there is."""
    assert here is not None
    return compiled.pack(here, Tile(2, ""))


def test_a_second_process_does_not_compile(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = packing()
    assert (len(fresh), packing()) == (1, first)
    monkeypatch.setattr(engine, "_ADDRESSES", {})
    assert packing() != first
    assert len(fresh) == 1
    monkeypatch.setattr(engine, "_ADDRESSES", {})
    monkeypatch.setattr(engine, "source", lambda folder: "another version")
    packing()
    assert len(fresh) == 2


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 5000])
def test_a_damaged_object_is_compiled_again(fresh: list[str], damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    packing()
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "hfquant" / "kernels").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    monkeypatch.setattr(engine, "_ADDRESSES", {})
    packing()
    assert len(fresh) == 2
    assert len(file.read_bytes()) == len(whole)


def test_a_folder_that_others_may_write_to_is_not_trusted(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packing()
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "hfquant" / "kernels"
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    monkeypatch.setattr(engine, "_ADDRESSES", {})
    packing()
    assert len(fresh) == 2


def test_without_a_folder_it_compiles_in_memory(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(os.environ["XDG_CACHE_HOME"]) / "hfquant").write_text("in the way")
    packing()
    assert len(fresh) == 1


def test_a_kernel_that_does_not_compile_steps_aside(fresh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("LLVM ERROR: no such instruction\nand more")

    monkeypatch.setattr(engine, "compile", fail)
    layer, x = layer_of(bits=3), torch.randn(2, 192)
    exact = x @ layer.dequantize(torch.float32).T
    with pytest.warns(RuntimeWarning, match="`cpu_int8` is not used any more: its code could not be made: LLVM ERROR"):
        y = layer(x)
    assert torch.equal(y, exact)
    assert torch.equal(layer(x), exact)  # and says so once
    assert kernels.choose(x, layer.matrix).kernel.name == "reference"


def test_without_llvmlite_the_next_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'llvmlite'")

    monkeypatch.setattr(machine, "level", missing)
    layer, x = layer_of(), torch.randn(1, 192)
    with kernels.mode("auto"):
        choice = kernels.choose(x, layer.matrix)
    assert choice.kernel.name == "int4pack"
    assert "pip install 'hfquant[cpu]'" in dict(choice.refused)["cpu_int8"]
    monkeypatch.setattr(machine, "level", lambda: None)
    with kernels.mode("exact"):
        choice = kernels.choose(x, layer.matrix)
    assert choice.kernel.name == "reference"
    assert dict(choice.refused)["cpu_exact"] == "this processor has no AVX2"


def test_levels_ask_for_all_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    import llvmlite.binding as llvm

    def best(*features: str) -> str | None:
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
        found = machine.level.__wrapped__()
        return None if found is None else str(found.name)

    every = machine.LEVELS[0].needs
    assert best(*every) == "avx512vnni"
    assert best(*(f for f in every if f != "avx512vnni")) == "avx2"
    assert best(*machine.LEVELS[2].needs, "avxvnni") == "avxvnni"
    assert best(*(f for f in machine.LEVELS[2].needs if f != "f16c")) is None


@pytest.mark.skipif(pool() is None, reason="torch has no OpenMP here")
@pytest.mark.parametrize("rows", [1, 40])
def test_threads_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the last bit; and they are torch's own: no thread is added."""
    monkeypatch.setattr(call, "SHARE", 1)
    layer, x = layer_of(200, 320), torch.randn(rows, 320)
    for mode in ("cpu_int8", "cpu_exact"):
        with kernels.mode(mode):
            alone = layer(x)
            torch.set_num_threads(2)
            try:
                torch.randn(512, 512) @ torch.randn(512, 512)  # torch starts its own
                before = len(os.listdir("/proc/self/task"))
                for _ in range(5):
                    assert torch.equal(layer(x), alone)
                assert len(os.listdir("/proc/self/task")) == before
            finally:
                torch.set_num_threads(1)


def test_callers_from_many_threads(fresh: list[str]) -> None:
    """One layer, many callers: nobody reads what another one prepared."""
    layer, xs = layer_of(64, 256), [torch.randn(n, 256) for n in (1, 2, 5, 9)]
    expected, wrong = [layer(x) for x in xs], []

    def work(i: int) -> None:
        with torch.no_grad(), kernels.mode("cpu_int8"):
            for _ in range(200):
                if not torch.equal(layer(xs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_small_weights_share_pages_and_large_ones_have_their_own() -> None:
    small = [memory.room((3, 100)) for _ in range(5)]
    assert all(t.data_ptr() % memory.LINE == 0 for t in small)
    assert len({t.untyped_storage().data_ptr() for t in small}) <= 2
    for i, t in enumerate(small):
        t.fill_(i)
    assert [int(t.max()) for t in small] == [0, 1, 2, 3, 4]
    large = memory.room((memory.SHARED,))
    assert large.data_ptr() % memory.PAGE == 0
    assert large.numel() == memory.SHARED


def test_under_a_default_device_it_stays_on_the_cpu() -> None:
    layer, x = layer_of(), torch.randn(2, 192)
    with torch.device("meta"), kernels.mode("cpu_int8"):
        assert layer(x).device.type == "cpu"
