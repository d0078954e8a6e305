"""The code of tiles, compiled when it is first asked for."""

from ...llvm import engine
from ...llvm.ir import Code
from ...llvm.machine import Level
from . import driver, packing, product
from .codes import Tile
from .integer import Integer
from .real import Real


def tile(level: Level, tile: Tile) -> int:
    """Address of the code of such a tile."""

    def generate(code: Code) -> None:
        product.generate(code, tile, (Real if tile.real else Integer)(code, tile))

    return engine.function(level, repr(tile), "tile", generate)


def work(level: Level, order: int, real: bool) -> int:
    """Address of the code of a call whose x has this order of columns."""
    return engine.function(level, f"work {order} {real}", "work", lambda code: driver.generate(code, order, real))


def pack(level: Level, tile: Tile) -> int:
    """Address of the code that packs such tiles."""
    return engine.function(level, f"pack {tile.bits}", "pack", lambda code: packing.generate(code, tile))
