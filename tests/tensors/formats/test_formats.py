"""What every wire format has to keep, whatever its bytes are."""

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from hfquant.errors import FormatError
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.formats import NAMES, Wire, check, choose, parse
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

SHAPES = [(64, 576), (96, 192), (32, 64), (37, 33), (5, 97), (3, 1), (64, 128)]
GRIDS = [Grid(b, g, s) for b in range(2, 9) for g in (-1, 32, 64, 50, 128) for s in (True, False)]


def quantized(grid: Grid, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> Quantized:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    W[0] = 0
    scale, zero = grid.fit(W, dtype=dtype)
    return Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_file_is_exact(name: str, grid: Grid) -> None:
    """Packed equals simulated, bit for bit, in every shape the format does not refuse."""
    fmt, stored = formats.load(name), 0
    for shape in SHAPES:
        if fmt.refuses(Encoding(grid), shape, "linear"):
            continue
        stored += 1
        Q = quantized(grid, shape)
        parts = fmt.pack(Q)
        spec = {component: (tuple(part.shape), part.dtype) for component, part in parts.items()}
        assert spec == fmt.spec(Encoding(grid), shape, torch.float16)
        back = fmt.unpack(load(save(parts)), Encoding(grid), shape)
        assert back.grid == grid
        assert torch.equal(back.codes, Q.codes)
        assert torch.equal(back.scale, Q.scale)
        assert torch.equal(back.zero_point, Q.zero_point)
        assert torch.equal(back.dequantize(), Q.dequantize())
        assert back.zero_point.dtype == back.codes.dtype == torch.uint8
    if name == "native":
        assert stored == len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["native", "compressed_tensors"])
def test_scales_keep_their_type(name: str, dtype: torch.dtype) -> None:
    grid, fmt = Grid(4, 32, True), formats.load(name)
    Q = quantized(grid, (64, 64), dtype)
    parts = fmt.pack(Q)
    assert {c: (tuple(p.shape), p.dtype) for c, p in parts.items()} == fmt.spec(Encoding(grid), (64, 64), dtype)
    assert torch.equal(fmt.unpack(parts, Encoding(grid), (64, 64)).scale, Q.scale)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_keeps_every_zero_point(bits: int, symmetric: bool) -> None:
    """Also 0 and the top, which a format that stores them minus one would wrap around."""
    grid, fmt = Grid(bits, 32, symmetric), formats.load("gptq")
    Q = quantized(grid, (64, 64))
    if not symmetric:
        zero = (torch.arange(128) % 2**bits).view(64, 2).to(torch.uint8)
        Q = Quantized(codes=Q.codes, scale=Q.scale, zero_point=zero, grid=grid)
    assert torch.equal(fmt.unpack(fmt.pack(Q), Encoding(grid), (64, 64)).zero_point, Q.zero_point)


def test_native_reads_a_slice_that_starts_between_words() -> None:
    grid, fmt = Grid(4, 32, True), formats.load("native")
    Q = quantized(grid, (8, 64))
    parts = fmt.pack(Q)
    loose = torch.zeros(parts["weight"].numel() + 1, dtype=torch.int8)
    loose[1:] = parts["weight"].flatten()
    parts["weight"] = loose[1:].view(parts["weight"].shape)
    assert torch.equal(fmt.unpack(parts, Encoding(grid), (8, 64)).codes, Q.codes)


WIRES = [
    Wire(format="native", layers={"a.q": Grid(3, 64, False), "a.k": Grid(4, -1, True)}, ignore=("lm_head",)),
    Wire(format="native", layers={"x": Grid(5, 32, True)}, scale_dtype=torch.bfloat16),
    Wire(format="compressed_tensors", layers={"*": Grid(4, 32, True)}, ignore=("lm_head", "score")),
    Wire(format="compressed_tensors", layers={"*": Grid(8, -1, True)}),
    Wire(format="gptq", layers={"*": Grid(3, 128, False)}, ignore=("lm_head",)),
    Wire(format="gptq", layers={"*": Grid(4, -1, True)}),
]


@pytest.mark.parametrize("wire", WIRES, ids=lambda w: f"{w.format}-{next(iter(w.layers.values()))}")
def test_configs_come_back(wire: Wire) -> None:
    config = formats.load(wire.format).config(wire)
    read = parse(config)
    assert read.format == wire.format
    assert dict(read.layers) == dict(wire.layers)
    assert read.ignore == wire.ignore
    assert read.raw == config
    if wire.format == "native":
        assert read.scale_dtype == wire.scale_dtype
    assert formats.load(wire.format).config(read) == config


def test_wire_finds_the_encoding_of_a_module() -> None:
    exact = Wire(format="native", layers={"a.q": Grid(3, 64, False)}, ignore=("lm_head",))
    assert exact.encoding("a.q") == Encoding(Grid(3, 64, False))
    assert exact.encoding("a.k") is None
    pattern = Wire(format="gptq", layers={"*": Grid(4, 32, True)}, ignore=("lm_head", "*.router"))
    assert pattern.encoding("a.q") == Encoding(Grid(4, 32, True))
    assert pattern.encoding("lm_head") is None
    assert pattern.encoding("blocks.0.router") is None


REFUSALS = [
    ("compressed_tensors", Grid(4, 32, False), (64, 64), "linear", "fail on packed zero points"),
    ("compressed_tensors", Grid(5, 32, True), (64, 64), "linear", "5 bit is not readable"),
    ("compressed_tensors", Grid(4, 128, True), (64, 576), "linear", "group 128 does not divide 576 columns"),
    ("compressed_tensors", Grid(4, 32, True), (64, 64), "conv1d", "expect nn.Linear, not conv1d"),
    ("compressed_tensors", Grid(4, 32, True), (64, 64), "embedding", "expect nn.Linear, not embedding"),
    ("gptq", Grid(5, 32, True), (64, 64), "linear", "5 bit does not exist"),
    ("gptq", Grid(4, 32, True), (64, 33), "linear", "64 x 33 is not a multiple of 32"),
    ("gptq", Grid(4, 32, True), (33, 64), "linear", "33 x 64 is not a multiple of 32"),
    ("gptq", Grid(4, 128, True), (64, 576), "linear", "group 128 does not divide 576 columns"),
    ("gptq", Grid(4, 32, True), (64, 64), "experts", "expect linear layers, not experts"),
]


@pytest.mark.parametrize(("name", "grid", "shape", "kind", "text"), REFUSALS)
def test_refusals_name_the_layer_and_the_way_out(
    name: str, grid: Grid, shape: tuple[int, int], kind: str, text: str
) -> None:
    assert text in (formats.load(name).refuses(Encoding(grid), shape, kind) or "")
    with pytest.raises(FormatError) as raised:
        check(name, {"model.layers.0.mlp.up": (Encoding(grid), shape, kind)})
    assert f"format `{name}` cannot store model.layers.0.mlp.up as {grid}" in raised.value.message
    assert raised.value.hint == "use `--set format=native`, which stores any grid, or change the grid"


def test_native_refuses_nothing() -> None:
    native = formats.load("native")
    assert all(native.refuses(Encoding(g), s, k) is None for g in GRIDS for s in SHAPES for k in formats.KINDS)
    check(
        "native",
        {
            "a": (Encoding(Grid(3, 50, False)), (5, 7), "conv1d"),
            "b": (Encoding(Grid(7, -1, True)), (5, 7), "embedding"),
        },
    )


def test_standard_formats_do_not_mix_grids() -> None:
    mixed = {
        "a": (Encoding(Grid(4, 32, True)), (64, 64), "linear"),
        "b": (Encoding(Grid(8, 32, True)), (64, 64), "linear"),
    }
    for name in ("compressed_tensors", "gptq"):
        with pytest.raises(FormatError, match="cannot mix grids") as raised:
            check(name, mixed)
        assert "--set format=native" in (raised.value.hint or "")
    assert choose(mixed) == "native"


CHOICES: list[tuple[str, list[tuple[Encoding, tuple[int, int], str]]]] = [
    ("compressed_tensors", [(Encoding(Grid(4, 32, True)), (64, 64), "linear")]),
    ("compressed_tensors", [(Encoding(Grid(8, -1, True)), (37, 33), "linear")]),
    (
        "compressed_tensors",
        [(Encoding(Grid(4, 32, True)), (64, 64), "linear"), (Encoding(Grid(4, 32, True)), (64, 64), "experts")],
    ),
    ("gptq", [(Encoding(Grid(4, 32, False)), (64, 64), "linear")]),
    ("gptq", [(Encoding(Grid(3, 64, True)), (64, 128), "linear")]),
    ("gptq", [(Encoding(Grid(2, 64, True)), (64, 128), "linear")]),
    ("gptq", [(Encoding(Grid(4, 32, True)), (64, 64), "conv1d")]),
    ("native", [(Encoding(Grid(4, 32, True)), (64, 64), "embedding")]),
    ("native", [(Encoding(Grid(4, 128, True)), (64, 576), "linear")]),
    ("native", [(Encoding(Grid(5, 32, True)), (64, 64), "linear")]),
    ("native", [(Encoding(Grid(4, 32, False)), (64, 64), "experts")]),
    (
        "native",
        [(Encoding(Grid(4, 32, False)), (64, 64), "linear"), (Encoding(Grid(4, 32, False)), (33, 64), "linear")],
    ),
]


@pytest.mark.parametrize(("name", "layers"), CHOICES, ids=lambda x: x if isinstance(x, str) else str(x[0][0]))
def test_choice_is_the_most_widely_loadable(name: str, layers: list[tuple[Encoding, tuple[int, int], str]]) -> None:
    named = {f"layer{i}": layer for i, layer in enumerate(layers)}
    assert choose(named) == name
    check(name, named)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(FormatError, match="unknown wire format `natve`") as raised:
        formats.load("natve")
    assert raised.value.hint == "did you mean `native`?"
    with pytest.raises(FormatError) as raised:
        formats.load("zzz")
    assert "compressed_tensors, gptq, native" in (raised.value.hint or "")


def config(wire: Wire, **changed: Any) -> dict[str, Any]:
    return formats.load(wire.format).config(wire) | changed


def test_configs_of_others_are_refused_with_a_reason() -> None:
    with pytest.raises(FormatError, match="cannot read a checkpoint quantized with `awq`"):
        parse({"quant_method": "awq"})
    with pytest.raises(FormatError, match="native format version 3") as raised:
        parse(config(WIRES[0], version=3))
    assert "upgrade hfquant" in (raised.value.hint or "")
    with pytest.raises(FormatError, match="activation order"):
        parse(config(WIRES[4], desc_act=True))
    with pytest.raises(FormatError, match="zero-point version"):
        parse(config(WIRES[4], checkpoint_format="gptq"))
    foreign = config(WIRES[2])
    foreign["config_groups"]["group_1"] = foreign["config_groups"]["group_0"]
    with pytest.raises(FormatError, match="more than one symmetric integer group"):
        parse(foreign)
