"""Code for processors that this one may not be: it compiles, has the instructions it is for, and, with those
instructions spelled out, computes the same numbers."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("llvmlite")

from hfquant.llvm import engine, machine
from hfquant.llvm.ir import Code
from hfquant.runtime.llvm import layout, product
from hfquant.runtime.llvm.call import Plan
from hfquant.runtime.llvm.codes import Tile
from hfquant.runtime.llvm.integer import Integer
from hfquant.runtime.llvm.real import Real
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid

from ..rounding import random

here = machine.level()
pytestmark = pytest.mark.skipif(here is None, reason="needs AVX2")
LEVELS = {level.name: level for level in machine.LEVELS}


def assembly(level: machine.Level, tile: Tile) -> str:
    def generate(code: Code) -> None:
        product.generate(code, tile, (Real if tile.real else Integer)(code, tile))

    return engine.assembly(level, generate)


@pytest.mark.parametrize(("name", "register"), [("avx512vnni", "zmm"), ("avxvnni", "ymm")])
def test_vnni_compiles_to_its_instruction(name: str, register: str) -> None:
    """One for 64 (32) products; unpacking 4 bits takes less than as many instructions again."""
    text = assembly(LEVELS[name], Tile(4, "float16", zeros=True))
    dots = re.findall(rf"vpdpbusd\s.*%{register}", text)
    parts = 64 // LEVELS[name].vector
    assert len(dots) == parts * 8 * sum(Integer(Code(LEVELS[name]), Tile(4, "float16")).together)
    assert "call" not in text.replace("callq", "").split("tile:")[1].split("vpdpbusd")[0]


def test_avx2_multiplies_in_pairs() -> None:
    text = assembly(LEVELS["avx2"], Tile(4, "float16"))
    assert text.count("vpmaddubsw") == 2 * 8 * (4 + 2 + 1)
    assert text.count("vpmaddwd") == 2 * (4 + 2 + 1)  # 8 sums in 16 bits for one in 32
    assert "vpdpbusd" not in text
    assert "zmm" not in text


@pytest.mark.parametrize(
    ("name", "bits", "kinds"), [("avx512vnni", 4, 4), ("avx512vnni", 8, 3), ("avxvnni", 8, 4), ("avx2", 7, 3)]
)
def test_weights_are_fetched_ahead(name: str, bits: int, kinds: int) -> None:
    """A register's line for each bit of a code, for so many of the numbers of rows: not for two by many registers."""
    assert assembly(LEVELS[name], Tile(bits, "float16")).count("prefetcht0") == kinds * bits


@pytest.mark.parametrize("name", ["avx512vnni", "avxvnni"])
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_every_kind_compiles_for_it(bits: int, real: bool, name: str) -> None:
    assert engine.compile(LEVELS[name], lambda code: _any(code, Tile(bits, "bfloat16", True, not real, real)))[:4] == (
        b"\x7fELF"
    )


def _any(code: Code, tile: Tile) -> None:
    product.generate(code, tile, (Real if tile.real else Integer)(code, tile))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("name", ["avx512vnni", "avxvnni"])
def test_its_code_with_the_instruction_spelled_out(name: str, bits: int) -> None:
    """The generator's whole path for that width of registers, on this machine: the same integers, sums and order."""
    assert here is not None
    emulated = replace(LEVELS[name], cpu=here.cpu, features=here.features, dot="emulated")
    activations = Activations(8, "group", 64, symmetric=bits != 5)
    Q, x = random(50, 200, Grid(bits, 64, False)), torch.randn(11, 200)
    how = layout.Preparation.of(Q.grid, 200, activations, real=False)
    found = [Plan(layout.Tiled(layout.Tiles(Q, level, how), how), x.shape, x.dtype)(x) for level in (here, emulated)]
    assert torch.equal(*found)
