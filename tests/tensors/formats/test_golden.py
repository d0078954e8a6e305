"""The bytes of every format, written down.

These words are in published checkpoints.  If a test here fails, the change makes all of them
unreadable: give the format a new version that is written beside the old one, and leave these literals as they are.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from hfquant.tensors.formats import Wire, load
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from hfquant.tensors.packing import pack_planes, pack_stream

# codes (7i + 3) mod 2^bits, i = 0..32: one column more than fills whole words
STREAM = {
    1: [1431655765, 1],
    2: [454761243, 454761243, 3],
    3: [1402433619, 1884526448, -1754246249, 3],
    4: [1299153315, -974714581, 1299153315, -974714581, 3],
    5: [1308378435, 2015648675, 122904957, 1260874996, -446926746, 3],
    6: [-1621028221, -1866738983, -1302882496, -1893720397, -1666477611, 1901299459, 35],
    7: [-217823997, 996717873, -176549279, 2104744342, 1957753088, 240724808, -1185516424, 99],
    8: [
        *(403769859, 875374111, 1346978363, 1818582615, -2004780429),
        *(-1533176177, -1061571925, -589967673, 227),
    ],
}
PLANES = {
    1: [1431655765, 1],
    2: [454761243, 454761243, 3],
    3: [454761243, 454761243, 3, -252645136, 0],
    4: [1299153315, -974714581, 1299153315, -974714581, 3],
    5: [1299153315, -974714581, 1299153315, -974714581, 3, -966575716, 0],
    6: [1299153315, -974714581, 1299153315, -974714581, 3, -1522276016, 1346278415, 2],
    7: [1299153315, -974714581, 1299153315, -974714581, 3, -1522276016, 1346278415, 2, -133956096, 1],
    8: [
        *(1299153315, -974714581, 1299153315, -974714581, 3),
        *(841027840, 1716868163, -1449621385, -573781062, 14),
    ],
}


def row(bits: int) -> Tensor:
    return ((7 * torch.arange(33) + 3) % 2**bits).to(torch.uint8)[None]


def square(bits: int, symmetric: bool) -> Quantized:
    """32 x 32, codes (o + 3i) mod 2^bits, zero points o mod 2^bits, scales (o + 1) / 8."""
    o, i = torch.arange(32)[:, None], torch.arange(32)[None]
    grid = Grid(bits, -1, symmetric)
    zero = torch.full_like(o, grid.middle) if symmetric else o % 2**bits
    return Quantized(
        codes=((o + 3 * i) % 2**bits).to(torch.uint8),
        scale=((o + 1) / 8).to(torch.float16),
        zero_point=zero.to(torch.uint8),
        grid=grid,
    )


@pytest.mark.parametrize("bits", STREAM)
def test_bit_streams(bits: int) -> None:
    """These words are in published checkpoints: see the head of this file."""
    assert pack_stream(row(bits), bits).tolist() == [STREAM[bits]]


@pytest.mark.parametrize("bits", PLANES)
def test_bit_planes(bits: int) -> None:
    """These words are in published checkpoints: see the head of this file."""
    assert pack_planes(row(bits), bits).tolist() == [PLANES[bits]]


@pytest.mark.parametrize("bits", PLANES)
def test_native(bits: int) -> None:
    """These words are in published checkpoints: see the head of this file."""
    Q = Quantized(
        codes=row(bits),
        scale=torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16),
        zero_point=torch.tensor([[1, 0]], dtype=torch.uint8),
        grid=Grid(bits, 32, False),
    )
    parts = load("native").pack(Q)
    assert list(parts) == ["weight", "weight_scale", "weight_zero_point"]
    assert parts["weight"].dtype == torch.int8
    assert parts["weight"].shape == (1, len(PLANES[bits]), 4)
    assert parts["weight"].numpy().tobytes() == b"".join(w.to_bytes(4, "little", signed=True) for w in PLANES[bits])
    assert parts["weight_scale"].view(torch.int16).tolist() == [[0x3F00, -0x4180]]  # 0.5 and -0.25 (0xBE80)
    assert parts["weight_zero_point"].tolist() == [[1, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors(bits: int) -> None:
    """These words are in published checkpoints: see the head of this file."""
    Q = Quantized(
        codes=row(bits),
        scale=torch.tensor([[0.5]], dtype=torch.float16),
        zero_point=torch.tensor([[2 ** (bits - 1)]], dtype=torch.uint8),
        grid=Grid(bits, -1, True),
    )
    parts = load("compressed_tensors").pack(Q)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "weight_packed": [STREAM[bits]],
        "weight_scale": [[0.5]],
        "weight_shape": [1, 33],
    }
    assert [part.dtype for part in parts.values()] == [torch.int32, torch.float16, torch.int64]


GPTQ_COLUMNS = {  # the words of output 0 and of output 31, down the input dimension
    2: ([1819044972, 1819044972], [454761243, 454761243]),
    3: ([-1733573736, -1013404733, -1413244757], [1468477783, 827819825, -2026809465]),
    4: ([1392285232, -629924168, 1392285232, -629924168], [1105954095, -916255321, 1105954095, -916255321]),
    8: (
        [151388928, 353505036, 555621144, 757737252, 959853360, 1161969468, 1364085576, 1566201684],
        [673522207, 875638315, 1077754423, 1279870531, 1481986639, 1684102747, 1886218855, 2088334963],
    ),
}
GPTQ_ZEROS = {
    (2, False): [-454761244, -454761244],
    (3, False): [-1996831096, -964101434, -87652102],
    (4, True): [2004318071] * 4,  # stored minus one: 7, 7, 7, ...
    (8, True): [2139062143] * 8,
}


@pytest.mark.parametrize(("bits", "symmetric"), GPTQ_ZEROS)
def test_gptq(bits: int, symmetric: bool) -> None:
    """These words are in published checkpoints: see the head of this file."""
    parts = load("gptq").pack(square(bits, symmetric))
    assert list(parts) == ["qweight", "qzeros", "scales", "g_idx"]
    assert parts["qweight"].T[0].tolist() == GPTQ_COLUMNS[bits][0]
    assert parts["qweight"].T[31].tolist() == GPTQ_COLUMNS[bits][1]
    assert parts["qzeros"].tolist() == [GPTQ_ZEROS[bits, symmetric]]
    assert parts["scales"].tolist() == [[(o + 1) / 8 for o in range(32)]]
    assert parts["g_idx"].tolist() == [0] * 32
    assert [part.dtype for part in parts.values()] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert all(part.is_contiguous() for part in parts.values())


DIGESTS = {
    "native": "4a7e673bedd70e64",
    "compressed_tensors": "d11420af774d7c16",
    "gptq": "f963c65621f5b116",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_whole_layer(name: str) -> None:
    """These bytes are in published checkpoints: see the head of this file."""
    parts = load(name).pack(square(4, True))
    digest = hashlib.sha256()
    for component, part in sorted(parts.items()):
        digest.update(f"{component} {part.dtype} {tuple(part.shape)}".encode() + part.numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


def test_native_config() -> None:
    """This is the `quantization_config` of published checkpoints: see the head of this file."""
    wire = Wire(format="native", layers={"a": Grid(3, 64, False), "b": Grid(4, -1, True)}, ignore=("lm_head",))
    assert load("native").config(wire) == {
        "quant_method": "hfquant",
        "format": "native",
        "version": 1,
        "scale_dtype": "float16",
        "groups": [
            {"bits": 3, "group_size": 64, "symmetric": False, "modules": ["a"]},
            {"bits": 4, "group_size": -1, "symmetric": True, "modules": ["b"]},
        ],
        "modules_to_not_convert": ["lm_head"],
    }
