"""Layers that read one tensor share a call: the same numbers, the same files, no more memory, and a way back."""

import copy
import threading

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("llvmlite")

from hfquant.llvm import machine
from hfquant.runtime import cache, kernels, together
from hfquant.runtime.kernels import _tiles
from hfquant.runtime.nn import QLinear
from hfquant.runtime.swap import dequantize_, swap
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.formats import Wire
from hfquant.tensors.grid import Grid
from tests.encoded import encode

from .rounding import fill, random

pytestmark = [
    pytest.mark.skipif(machine.level() is None, reason="needs AVX2"), pytest.mark.usefixtures("fastest"),
]  # fmt: skip


class Gated(nn.Module):
    """Three layers that read one tensor, then one that does not."""

    def __init__(self, *layers: QLinear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def layer(out: int, grid: Grid, seed: int = 0, columns: int = 192, bias: bool = False, fmt: str = "native") -> QLinear:
    Q = random(out, columns, grid, seed)
    values = torch.randn(out, generator=torch.Generator().manual_seed(seed)) if bias else None
    return QLinear.from_quantized(Q, values, formats.load(fmt), torch.bfloat16)


def inputs(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16, columns: int = 192) -> Tensor:
    return torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(layers: list[QLinear], x: Tensor) -> list[Tensor]:
    """Each by itself."""
    return [kernels.linear(x, each.matrix, each.bias) for each in layers]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every weight that is multiplied from now on."""
    from hfquant.runtime.llvm.call import Plan

    made: list[int] = []
    run = Plan.__call__

    def counted(self: Plan, *args: object) -> Tensor:
        made.append(self.weight.out_features)
        return run(self, *args)

    monkeypatch.setattr(Plan, "__call__", counted)
    return made


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(p.dtype == q.dtype and p.is_contiguous() and torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["auto", "exact"])
@pytest.mark.parametrize("bits", range(2, 9))
@torch.no_grad()
def test_bit_for_bit(bits: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for symmetric, bias, dtype in ((True, False, torch.bfloat16), (False, True, torch.float32)):
        grid = Grid(bits, 64, symmetric)
        sizes = (48, 16, 41)
        block = Gated(*(layer(n, grid, i, bias=bias).to(dtype) for i, n in enumerate(sizes)))
        with kernels.mode(mode):
            for rows in (1, 1, 5, 5, 64, 64):
                found = [block(inputs(rows, seed, dtype)) for seed in range(3)]
                expected = [apart(list(block.layers), inputs(rows, seed, dtype)) for seed in range(3)]
                assert all(map(equal, found, expected)), (grid, rows)
            with monkeypatch.context() as patch:
                made = calls(patch)
                block(inputs(1, 9, dtype))
                assert made == [sum(sizes)]


@pytest.mark.parametrize("encoding", ["w4g64sym-a8token", "w8sym-a8token", "w4g64-a8g64", "w4g64sym-2of4"])
@torch.no_grad()
def test_rounded_inputs_and_sparse_weights(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, native = Encoding.parse(encoding), formats.load("native")
    Qs = [encode(torch.randn(48, 192, generator=torch.Generator().manual_seed(seed)), kind) for seed in range(2)]
    block = Gated(*(QLinear.from_quantized(Q, None, native, torch.bfloat16) for Q in Qs))
    x = inputs(1, 0)
    for _ in range(3):
        assert equal(block(x), apart(list(block.layers), x))
    made = calls(monkeypatch)
    block(inputs(1, 1))
    assert made == [96]


@pytest.mark.parametrize(
    "other",
    [
        layer(48, Grid(3, 64, True)),
        layer(48, Grid(4, 32, True)),
        layer(48, Grid(4, 64, False)),
        layer(48, Grid(4, 64, True), bias=True),
        layer(48, Grid(4, 64, True)).requires_grad_(False).to(torch.float32),
    ],
    ids=["bits", "groups", "zero points", "bias", "same"],
)
@torch.no_grad()
def test_what_differs_stays_alone(
    other: QLinear, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Gated(layer(48, Grid(4, 64, True)), copy.deepcopy(other))
    for seed in range(3):
        x = inputs(1, seed)
        assert equal(block(x), apart(list(block.layers), x))
    made = calls(monkeypatch)
    block(inputs(1, 9))
    assert made == ([96] if request.node.callspec.id == "same" else [48, 48])


@torch.no_grad()
def test_rows_that_fill_no_tile_stay_alone_unless_last(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Gated(layer(41, Grid(4, 64)), layer(48, Grid(4, 64), 1))
    for seed in range(3):
        assert equal(block(inputs(1, seed)), apart(list(block.layers), inputs(1, seed)))
    made = calls(monkeypatch)
    block(inputs(1, 9))
    assert made == [41, 48]


def pair(bias: bool = False) -> Gated:
    """Two layers that have been joined."""
    block = Gated(layer(48, Grid(4, 64), 0, bias=bias), layer(32, Grid(4, 64), 1, bias=bias)).bfloat16()
    with torch.no_grad():
        for seed in range(3):
            block(inputs(1, seed))
    return block


@torch.no_grad()
def test_what_is_stored_and_what_memory_it_takes() -> None:
    import gc

    gc.collect()
    before, block = cache.size(), Gated(layer(48, Grid(4, 64), 0), layer(32, Grid(4, 64), 1))
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(inputs(1, 0))
    alone = cache.size() - before
    for rows in (1, 1, 2, 2, 2):
        block(inputs(rows, 1))
    assert cache.size() - before == alone > 0
    held = [cache.entry(each.parts).derived[_tiles.TILES] for each in block.layers]
    assert len({part.codes.untyped_storage().data_ptr() for part in held}) == 1
    assert held[0].codes.data_ptr() + held[0].codes.nbytes == held[1].codes.data_ptr()
    assert block.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    twin = copy.deepcopy(block)
    assert equal(twin(inputs(1, 5)), block(inputs(1, 5)))
    del block, twin
    gc.collect()
    assert cache.size() == before


@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_a_weight_that_changes(place: int) -> None:
    block, x = pair(), inputs(1, 7)
    block.layers[place].load_state_dict(layer((48, 32)[place], Grid(4, 64), 9).state_dict())
    for _ in range(2 * together.PATIENCE):
        assert equal(block(x), apart(list(block.layers), x))


@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_a_bias_that_changes(place: int) -> None:
    block, x = pair(bias=True), inputs(1, 7)
    block.layers[place].bias += 1
    assert equal(block(x), apart(list(block.layers), x))
    block.layers[place].bias = nn.Parameter(torch.randn((48, 32)[place]).bfloat16(), requires_grad=False)
    for _ in range(2):
        assert equal(block(x), apart(list(block.layers), x))


@torch.no_grad()
def test_an_input_that_changes_in_between() -> None:
    block, x = pair(), inputs(1, 7)
    first, second = block.layers
    first(x)
    x += 1
    assert torch.equal(second(x), kernels.linear(x, second.matrix, None))
    same = x.clone()
    first(x)
    assert torch.equal(second(same), kernels.linear(x, second.matrix, None))
    y = first(x)
    y.zero_()  # what one makes of its result is no business of the other
    assert torch.equal(second(x), kernels.linear(x, second.matrix, None))
    assert torch.equal(second(x), kernels.linear(x, second.matrix, None))  # taken already


@torch.no_grad()
def test_layers_that_stop_to_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    block = pair()
    made = calls(monkeypatch)
    for seed in range(together.PATIENCE + 2):
        block.layers[0](inputs(1, seed))
    assert made[0] == 80
    assert made[-1] == 48
    assert equal(block(inputs(1, 5)), apart(list(block.layers), inputs(1, 5)))


def test_where_somebody_watches() -> None:
    """Gradients, operators in a graph, autocast and inference mode: every layer by itself, and right."""
    block = pair()
    x = inputs(1, 3).requires_grad_()
    expected = apart(list(block.layers), x.detach())
    assert equal([y.detach() for y in block(x)], expected)
    block(x)[1].sum().backward()
    assert x.grad is not None
    x = x.detach()
    assert equal(block(x), expected)  # with gradients on, of nothing
    with torch.inference_mode():
        assert equal(block(x), expected)
        assert equal(block(x.clone()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(block(x.float()), apart(list(block.layers), x))
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert equal(compiled(x), expected)
        assert equal(block(x), expected)


def test_threads_do_not_take_from_each_other() -> None:
    block, wrong = pair(), []

    def work(seed: int) -> None:
        with torch.no_grad(), kernels.mode("auto"):
            for i in range(50):
                x = inputs(1, 100 * seed + i)
                if not equal(block(x), apart(list(block.layers), x)):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_can_be_switched_off_and_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "_EXPLAINED", set())
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    pair()
    said = "native w4g64sym 48x192 + native w4g64sym 32x192, 1 x bfloat16: one call, as they read one tensor"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(kernels, "_EXPLAINED", set())
    monkeypatch.setenv("HFQUANT_FUSE", "0")
    block = pair()
    assert "one call" not in capsys.readouterr().err
    made = calls(monkeypatch)
    with torch.no_grad():
        block(inputs(1, 0))
    assert made == [48, 32]


CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def llama(**grids: Grid) -> transformers.PreTrainedModel:
    """A model whose linear layers are packed; grids: of some of them, by the last part of their names."""
    torch.manual_seed(0)
    model, dense = (transformers.AutoModelForCausalLM.from_config(CONFIG).eval() for _ in range(2))
    layers = {
        name: grids.get(name.rpartition(".")[2], Grid(4, 32))
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    swap(model, Wire(format="native", layers=layers))
    fill(model, dense)
    return model.bfloat16()


def generate(model: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, fuse: str) -> Tensor:
    """Scores of some tokens, fed one by one."""
    monkeypatch.setenv("HFQUANT_FUSE", fuse)
    with torch.no_grad():
        past = model(torch.arange(6)[None], use_cache=True).past_key_values
        found = []
        for token in range(5):
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
    return torch.cat(found)


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    expected = generate(copy.deepcopy(model), monkeypatch, "0")
    assert torch.equal(generate(model, monkeypatch, "1"), expected)
    made = calls(monkeypatch)
    assert torch.equal(generate(model, monkeypatch, "1"), expected)
    assert made[-8:] == [128, 64, 192, 64] * 2  # q + k + v, o, gate + up, down
    dequantize_(model, torch.bfloat16)
    assert not any(isinstance(module, QLinear) for module in model.modules())


def test_a_model_whose_layers_have_different_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(v_proj=Grid(8, 32), up_proj=Grid(3, 32))
    expected = generate(copy.deepcopy(model), monkeypatch, "0")
    assert torch.equal(generate(model, monkeypatch, "1"), expected)
    made = calls(monkeypatch)
    assert torch.equal(generate(model, monkeypatch, "1"), expected)
    assert made[-12:] == [96, 32, 64, 96, 96, 64] * 2  # q + k; v, o, gate, up, down


def test_a_model_with_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(llama(), config).eval()
    expected = generate(copy.deepcopy(adapted), monkeypatch, "0")
    found = [generate(adapted, monkeypatch, "1") for _ in range(2)]
    assert all(torch.equal(each, expected) for each in found)
