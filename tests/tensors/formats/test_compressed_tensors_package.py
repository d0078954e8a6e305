"""What we write as compressed-tensors, read by that package and by transformers with nothing of ours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import hfquant
from hfquant.compress import compress
from hfquant.tensors.formats import load
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests import families
from tests.plugin.models import logits, relative
from tests.plugin.test_encodings import write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # theirs
]
package = pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is an optional witness")


@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 576)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_package(bits: int, shape: tuple[int, int]) -> None:
    from compressed_tensors.compressors.pack_quantized import helpers

    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grid = Grid(bits, -1, True)
    Q = Quantized(
        codes=codes,
        scale=torch.ones(shape[0], 1, dtype=torch.float16),
        zero_point=torch.full((shape[0], 1), grid.middle, dtype=torch.uint8),
        grid=grid,
    )
    signed = (codes.to(torch.int16) - grid.middle).to(torch.int8)
    ours = load("compressed_tensors").pack(Q)["weight_packed"]
    assert torch.equal(ours, helpers.pack_to_int32(signed, bits))
    assert torch.equal(helpers.unpack_from_int32(ours, bits, torch.Size(shape)), signed)


@pytest.mark.parametrize("name", ["w4g32sym", "w8sym"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "opt", "bart", "mixtral", "qwen3_moe"])
def test_stock_transformers_computes_the_same(
    family: str, name: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    list(compress(built(family), f"rtn-{name}", out))
    stock = getattr(transformers, families.FAMILIES[family].auto).from_pretrained(out, dtype=torch.float32).eval()
    ours = hfquant.dequantize(hfquant.load(out, dtype=torch.float32), torch.float32).eval()
    windows = families.held_out(2)
    with torch.no_grad():
        expected = ours(**families.inputs(ours, windows)).logits
        logits = stock(**families.inputs(stock, windows)).logits
    weights, unpacked = dict(ours.named_parameters()), 0
    for parameter_name, parameter in stock.named_parameters():  # the forward has unpacked them
        if parameter_name in weights:
            assert torch.equal(parameter, weights[parameter_name].to(parameter.dtype)), parameter_name
            unpacked += parameter_name.removesuffix(".weight") in families.linears(family)
    assert unpacked == len(families.linears(family))
    # transformers unpacks fused experts in the type of their scales, whatever type it was asked for
    close = 2e-2 if "experts" in str(families.linears(family)) else 1e-4
    torch.testing.assert_close(logits, expected, rtol=close, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize("inputs", ["a8token", "a8tokenasym", "a8static", "a8staticasym"])
@pytest.mark.parametrize("grid", ["w8sym", "w4g32sym"])
def test_stock_transformers_rounds_the_inputs_too(
    grid: str, inputs: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    """With static scales it computes the same; its dynamic ones divide by 127.5 instead of 127."""
    same = write("llama", tmp_path / "a", built("llama"), "compressed_tensors", (f"{grid}-{inputs}",))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    scheme = stock.model.layers[0].mlp.down_proj.quantization_scheme
    assert scheme.input_activations.num_bits == 8
    assert relative(logits(stock), logits(same)) < (1e-4 if "static" in inputs else 0.06)
