"""What is stored beside a grid: it comes back exactly, and takes the bytes that arithmetic says."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from hfquant.errors import FormatError
from hfquant.tensors import formats
from hfquant.tensors.encoding import Activations, Encoding, Sparsity
from hfquant.tensors.formats import Wire, check, choose, parse
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests.encoded import encode

NATIVE = formats.load("native")
GRIDS = ("w16sym", "w4g64sym", "w3g50", "w8sym", "w5g32", "w2")
EXTRAS = (
    "kept5000", "kept1", "kept12288", "2of4", "1of4", "4of8", "1of2", "3of6", "8of16", "r8", "r1", "s", "a8token",
    "a8tensor", "a8static", "a8staticasym", "a8g32", "a4tokenasym", "2of4-r8-a8token-s", "kept5000-r4-a8static-s",
)  # fmt: skip


def weight(shape: tuple[int, int] = (64, 192)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05


def same(a: Quantized, b: Quantized) -> bool:
    """All that decides the output; codes where nothing is kept may differ."""
    pairs = [(a.filled.codes, b.filled.codes), *((getattr(a, n), getattr(b, n)) for n in ("scale", "zero_point"))]
    names = ("mask", "input_scale", "activation_scale", "activation_zero")
    pairs += [(getattr(a, name), getattr(b, name)) for name in names]
    if a.low_rank and b.low_rank:
        pairs += [(getattr(a.low_rank, name), getattr(b.low_rank, name)) for name in ("u", "v", "scale")]
    both = all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)
    return both and a.encoding == b.encoding and (a.low_rank is None) == (b.low_rank is None)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("grid", GRIDS)
def test_native_round_trip_through_a_file(grid: str, extra: str) -> None:
    encoding = Encoding.parse(f"{grid}-{extra}")
    Q = encode(weight(), encoding)
    assert Q.encoding == encoding
    parts = NATIVE.pack(Q)
    spec = {component: (tuple(part.shape), part.dtype) for component, part in parts.items()}
    assert spec == NATIVE.spec(encoding, Q.shape, torch.float16)
    back = NATIVE.unpack(load(save(parts)), encoding, Q.shape)
    assert same(back, Q)
    torch.testing.assert_close(back.dequantize(), Q.dequantize(), rtol=0, atol=0)
    assert parts["weight"].ndim == 3  # a loader that does not know it stops at the shape
    assert parts["weight"].dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_values_that_are_not_quantized_keep_their_type(dtype: torch.dtype) -> None:
    W = weight((5, 33))
    for text in ("w16sym-r2", "w16sym-kept31", "w16sym-1of3"):
        Q = encode(W, Encoding.parse(text), dtype)
        parts = NATIVE.pack(Q)
        assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == NATIVE.spec(Q.encoding, Q.shape, dtype)
        back = NATIVE.unpack(load(save(parts)), Q.encoding, Q.shape)
        assert back.codes.dtype == dtype
        assert same(back, Q)
    kept = Q.mask
    assert kept is not None
    assert torch.equal(back.dequantize()[kept], W.to(dtype).float()[kept])


def planes(count: int, widths: tuple[int, ...]) -> int:
    """Bytes of `count` codes in planes of these widths, each filling whole words."""
    return sum(4 * math.ceil(count * width / 32) for width in widths)


# (encoding, bytes of a [256, 512] weight, computed here by hand)
SIZES = [
    ("w4g64sym", 256 * (512 // 2 + 8 * 2)),
    ("w4g64sym-2of4", 256 * (256 // 2 + planes(128, (2, 1)) + 8 * 2)),  # 2 + 0.75 bits per weight, and scales
    ("w4g64-2of4", 256 * (256 // 2 + planes(128, (2, 1)) + 8 * 3)),
    ("w16sym-2of4", 256 * (256 * 2 + planes(128, (2, 1)))),
    ("w4g64sym-4of8", 256 * (256 // 2 + planes(64, (4, 2, 1)) + 8 * 2)),  # 70 choices: 7 bits for 8 weights
    ("w4g64sym-1of4", 256 * (128 // 2 + planes(128, (2,)) + 8 * 2)),
    ("w4g64sym-8of16", 256 * (256 // 2 + 512 // 8 + 8 * 2)),
    ("w4g64sym-kept65536", 65536 // 2 + 256 * (512 // 8 + 8 * 2)),
    ("w3g64sym-kept1001", planes(1001, (2, 1)) + 256 * (512 // 8 + 8 * 2)),
    ("w16sym-kept1001", 4 * math.ceil(1001 / 2) + 256 * 512 // 8),
    ("w8sym-r8", 256 * (512 + 2) + 8 * (256 + 512 + 4)),
    ("w8sym-s", 256 * (512 + 2) + 512 * 4),
    ("w8sym-a8static", 256 * (512 + 2) + 4),
    ("w8sym-a8staticasym", 256 * (512 + 2) + 8),
    ("w8sym-a8token", 256 * (512 + 2)),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_bytes_are_those_of_the_arithmetic(text: str, size: int) -> None:
    Q = encode(weight((256, 512)), Encoding.parse(text))
    parts = NATIVE.pack(Q)
    assert sum(part.nbytes for part in parts.values()) == size
    data = save(parts)
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == size


def test_sparse_is_smaller_where_arithmetic_says_so() -> None:
    """Half of 4 bit: 2.75 bits per weight with 2:4, 3 with a bitmask.  A bitmask of 80% costs more than it saves."""

    def bits(text: str) -> float:
        spec = NATIVE.spec(Encoding.parse(text), (1024, 1024), torch.float16)
        sizes = {n: math.prod(shape) * dtype.itemsize for n, (shape, dtype) in spec.items() if n != "weight_scale"}
        return 8 * sum(sizes.values()) / 1024**2

    assert bits("w4g64sym") == 4
    assert bits("w4g64sym-2of4") == 2.75
    assert bits(f"w4g64sym-kept{1024**2 // 2}") == 3
    assert bits("w4g64sym-4of8") == 2.875
    assert bits("w16sym-2of4") == 8.75
    assert bits("w8sym-2of4") == 4.75
    assert bits(f"w4g64sym-kept{1024**2 * 8 // 10}") > 4


def test_golden_places() -> None:
    """These bytes are in published checkpoints: a change of them needs a new version of the format."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    half = torch.full((1, 1), 0.5, dtype=torch.float16)
    Q = Quantized(
        codes=codes, scale=half, zero_point=torch.full((1, 1), 8, dtype=torch.uint8), grid=Grid(4, -1), mask=mask
    )
    bitmask = NATIVE.pack(Q)
    assert bitmask["weight_mask"].tolist() == [[0b01010011, 0b01101100]]
    kept = [0x10, 0x64, 0xBA - 256, 0xED - 256]  # codes 0 1 4 6 10 11 13 14, the first in the lower half
    assert bitmask["weight"].tolist() == [[kept]]
    pattern = NATIVE.pack(Quantized(**{**vars(Q), "pattern": (2, 4)}))
    assert pattern["weight"].tolist() == [[kept]]
    # choices 0 (places 0, 1), 1 (0, 2), 5 (2, 3), 3 (1, 2): low bits 0 1 1 3 in pairs, then the high bits 0 0 1 0
    assert pattern["weight_index"].tolist() == [[0b11010100, 0, 0, 0, 0b0100, 0, 0, 0]]


def test_the_config_says_everything_and_of_grids_nothing_new() -> None:
    layers = {
        "a": Encoding(Grid(4, 64)),
        "b": Encoding.parse("w3g64-kept77-r8-a8staticasym-s"),
        "c": Encoding.parse("w16sym-2of4"),
    }
    wire = Wire(format="native", layers=layers, ignore=("lm_head",))
    config = NATIVE.config(wire)
    assert config["version"] == 2
    assert config["groups"] == [
        {"bits": 4, "group_size": 64, "symmetric": True, "modules": ["a"]},
        {
            "bits": 3, "group_size": 64, "symmetric": False, "sparsity": {"n": 77, "m": 0}, "rank": 8,
            "activations": {"bits": 8, "per": "static", "group_size": -1, "symmetric": False}, "scaled_input": True,
            "modules": ["b"],
        },
        {"bits": 16, "group_size": -1, "symmetric": True, "sparsity": {"n": 2, "m": 4}, "modules": ["c"]},
    ]  # fmt: skip
    assert parse(config).layers == layers
    assert NATIVE.config(parse(config)) == config
    assert NATIVE.config(Wire(format="native", layers={"a": layers["a"]}))["version"] == 1


def test_how_layers_turned_out_replaces_what_was_expected() -> None:
    wire = Wire(format="native", layers={"a": Encoding.parse("w4-kept500"), "b": Encoding(Grid(4))}, raw={"x": 1})
    found = wire.as_written({"a": Encoding.parse("w4-kept493")})
    assert found.layers == {"a": Encoding.parse("w4-kept493"), "b": Encoding(Grid(4))}
    assert found.raw is None
    standard = Wire(format="gptq", layers={"a": Encoding(Grid(4))}).as_written({"a": Encoding.parse("w4g128sym-2of4")})
    assert standard.layers == {"a": Encoding(Grid(4))}  # the zeros are stored


@pytest.mark.parametrize("name", ["gptq", "compressed_tensors"])
@pytest.mark.parametrize("text", ["w4g32sym-2of4", "w4g32sym-kept3000", "w8sym-kept3000"])
def test_standard_formats_store_the_zeros(name: str, text: str) -> None:
    fmt, encoding = formats.load(name), Encoding.parse(text)
    Q = encode(weight(), encoding)
    check(name, {"a": (encoding, Q.shape, "linear")})
    parts = fmt.pack(Q)
    assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == fmt.spec(encoding, Q.shape, torch.float16)
    back = fmt.unpack(load(save(parts)), fmt.keeps(encoding), Q.shape)
    assert back.mask is None
    assert Q.mask is not None
    assert torch.equal(back.dequantize(), Q.dequantize())
    assert int((back.dequantize() == 0).sum()) >= int((~Q.mask).sum()) > 0


INPUTS = ["a8token", "a8tokenasym", "a8tensor", "a8static", "a8staticasym", "a8g32"]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("grid", ["w8sym", "w4sym", "w4g32sym", "w8g64sym"])
def test_compressed_tensors_with_activations(grid: str, inputs: str) -> None:
    fmt, encoding = formats.load("compressed_tensors"), Encoding.parse(f"{grid}-{inputs}")
    Q = encode(weight(), encoding)
    parts = fmt.pack(Q)
    assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == fmt.spec(encoding, Q.shape, torch.float16)
    assert parts["weight"].dtype == torch.int8
    signed = parts["weight"].float() * Q.grid.expand(parts["weight_scale"].float(), 192)
    torch.testing.assert_close(signed, Q.dequantize(), rtol=1e-6, atol=0)  # the standard's own arithmetic
    assert same(fmt.unpack(load(save(parts)), encoding, Q.shape), Q)
    wire = Wire(format="compressed_tensors", layers={"*": encoding}, ignore=("lm_head",))
    read = parse(fmt.config(wire))
    assert read.layers == wire.layers
    assert fmt.config(read) == fmt.config(wire)


def test_w8a8_is_written_as_the_standard_has_it() -> None:
    wire = Wire(format="compressed_tensors", layers={"a": Encoding.parse("w8sym-a8token")})
    config = formats.load("compressed_tensors").config(wire)
    assert config["format"] == "int-quantized"
    group = config["config_groups"]["group_0"]
    assert group["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False
    }  # fmt: skip
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
    }  # fmt: skip
    static = Wire(format="compressed_tensors", layers={"a": Encoding.parse("w8sym-a8static")})
    said = formats.load("compressed_tensors").config(static)["config_groups"]["group_0"]["input_activations"]
    assert (said["strategy"], said["dynamic"]) == ("tensor", False)


def test_activations_of_both_signs_and_of_one_share_a_checkpoint() -> None:
    """Which ones a layer has is known only when its inputs were seen; each kind gets a group that names its layers."""
    layers = {"m.a": Encoding.parse("w8sym-a8token"), "m.b": Encoding.parse("w8sym-a8tokenasym")}
    check("compressed_tensors", {name: (e, (64, 64), "linear") for name, e in layers.items()})
    wire = Wire(format="compressed_tensors", layers=layers, ignore=("lm_head",))
    config = formats.load("compressed_tensors").config(wire)
    assert [group["targets"] for group in config["config_groups"].values()] == [["m.a"], ["m.b"]]
    read = parse(config)
    assert [read.encoding(name) for name in ("m.a", "m.b", "lm_head", "other")] == [*layers.values(), None, None]


CHOICES = {
    "w8sym-a8token": "compressed_tensors",
    "w8sym-a8static": "compressed_tensors",
    "w4g32sym-a8token": "native",  # int-quantized takes a byte for every 4-bit weight
    "w8sym-a4token": "native",
    "w4g32sym-2of4": "native",  # stored small
    "w4g32sym-r8": "native",
    "w4g32sym-s": "native",
    "w16sym-2of4": "native",
    "w16sym-a8token": "native",
}


@pytest.mark.parametrize(("text", "name"), CHOICES.items())
def test_choice(text: str, name: str) -> None:
    layers = {"a": (Encoding.parse(text), (64, 192), "linear")}
    assert choose(layers) == name
    check(name, layers)


REFUSALS: list[tuple[str, str, str, str]] = [
    ("gptq", "w4g32sym-r8", "linear", "stores weights and nothing else"),
    ("gptq", "w4g32sym-a8token", "linear", "stores weights and nothing else"),
    ("gptq", "w4g32sym-s", "conv1d", "stores weights and nothing else"),
    ("gptq", "w16sym-2of4", "linear", "16 bit does not exist"),
    ("compressed_tensors", "w16sym-2of4", "linear", "16 bit is not readable"),
    ("compressed_tensors", "w4g32sym-r8", "linear", "no low-rank factors"),
    ("compressed_tensors", "w4g32sym-s", "linear", "no scale for the columns of the input"),
    ("compressed_tensors", "w8sym-a6token", "linear", "round activations to 8 bit, not 6"),
    ("compressed_tensors", "w8sym-a8g50", "linear", "group 50 of activations does not divide 192"),
    ("native", "w4g32sym-kept100", "experts", "use a pattern such as 2of4"),
    ("native", "w4g32sym-kept100", "embedding", "use a pattern such as 2of4"),
    ("native", "w4g32sym-2of5", "linear", "5 does not divide 192 columns"),
    ("native", "w4g32sym-r8", "experts", "experts cannot have low-rank factors"),
    ("native", "w4g32sym-s", "experts", "experts cannot have an input scale"),
    ("native", "w4g32sym-a8static", "experts", "experts cannot have static scales"),
    ("native", "w4g32sym-a8token", "embedding", "an embedding has no input to round"),
]


@pytest.mark.parametrize(("name", "text", "kind", "reason"), REFUSALS)
def test_refusals_have_a_way_out(name: str, text: str, kind: str, reason: str) -> None:
    with pytest.raises(FormatError, match=r"cannot store model\.up as") as raised:
        check(name, {"model.up": (Encoding.parse(text), (64, 192), kind)})
    assert reason in raised.value.message
    assert ("`keep`" if name == "native" else "format=native") in (raised.value.hint or "")


def test_a_mask_that_is_not_what_it_says_is_not_stored() -> None:
    Q = encode(weight(), Encoding.parse("w4g32sym-2of4"))
    assert Q.mask is not None
    Q.mask[3, 8:12] = torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match="does not keep 2 of every 4"):
        NATIVE.pack(Q)


def test_foreign_activations_are_refused_with_a_reason() -> None:
    wire = Wire(format="compressed_tensors", layers={"a": Encoding(Grid(8, -1), activations=Activations())})
    config: dict[str, Any] = formats.load("compressed_tensors").config(wire)
    config["config_groups"]["group_0"]["input_activations"]["strategy"] = "block"
    with pytest.raises(FormatError, match="rounds activations per block"):
        parse(config)


def test_sparsity_says_how_much_is_kept() -> None:
    Q = encode(weight(), Encoding.parse("w4g32sym-kept5000"))
    assert Q.encoding.sparsity == Sparsity(5000)
    assert float((Q.dequantize() != 0).sum()) <= 5000
