"""One call: every thread prepares its share of x's rows, all wait, and then take tiles until there are none."""

from ...llvm.ir import I32, I64, POINTER, Code, Value
from . import inputs
from .records import Call, Weight


def generate(code: Code, order: int, real: bool) -> None:
    """`work(call)`, what every thread runs; with real, and an order of columns, see `inputs`."""
    inputs.generate(code, order, real)
    with code.function("work", 1) as made:
        (call,) = made.args
        count = code.field(call, Call.COUNT)
        thread, threads = code.variable(I64, code.number(0)), code.variable(I64, code.number(1))
        many = code.nonzero(code.field(call, Call.THREADS))
        with code.if_then(many):
            code.set(thread, code.sext(code.call_at(code.field(call, Call.THREAD), returns=I32), I64))
            code.set(threads, code.sext(code.call_at(code.field(call, Call.THREADS), returns=I32), I64))
        me, all_ = code.get(thread), code.get(threads)
        with code.loop(code.sdiv(code.mul(count, code.plus(me, 1)), all_), code.sdiv(code.mul(count, me), all_)) as row:
            code.call(code.module.globals["prepare"], [call, row, me])
        with code.if_then(many):
            code.call_at(code.field(call, Call.BARRIER))
        _take_tiles(code, call, count)


def _take_tiles(code: Code, call: Value, count: Value) -> None:
    """Tiles of the first band of rows, of the second, and so on, a few at a time."""
    tiles, step, band = (code.field(call, place) for place in (Call.TILES, Call.STEP, Call.BAND))
    bands = code.sdiv(code.plus(count, band, -1), band)
    work = code.mul(bands, tiles)
    counter = code.inttoptr(code.plus(call, 8 * Call.NEXT), POINTER)
    head, body, after = (code.append_basic_block(name) for name in ("take", "taken", "done"))
    code.branch(head)
    code.position_at_end(head)
    first = code.atomic_rmw("add", counter, step, "monotonic")
    code.cbranch(code.icmp_signed("<", first, work), body, after)
    code.position_at_end(body)
    with code.loop(code.least(code.add(first, step), work), first) as item:
        tile, start = code.srem(item, tiles), code.mul(code.sdiv(item, tiles), band)
        end = code.least(code.add(start, band), count)
        code.call_at(code.field(code.field(call, Call.WEIGHT), Weight.TILE), call, tile, start, end)
    code.branch(head)
    code.position_at_end(after)
