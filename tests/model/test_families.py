"""Every family through the whole machinery: found, streamed, compressed, carried over, loaded again."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import hfquant
from hfquant.compress import LayerResult, compress, plan
from hfquant.errors import RecipeError
from hfquant.model.source import open_source
from hfquant.model.stream import stream_logits
from tests import families
from tests.families import FAMILIES, QUICK

Folder = Callable[[str], Path]
FUSED = re.compile(r"experts\.(gate_up|down)_proj$")
# as the checkpoints of these families have them: one tensor per expert and projection
PER_EXPERT = {
    "mixtral": r"\.experts\.\d+\.w[123]\.weight$",
    "qwen3_moe": r"\.experts\.\d+\.(gate|up|down)_proj\.weight$",
}
TRAINED = [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES]


def recipe(method: str, bits: int, group_size: int = 32, *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """A recipe that changes no type, so that what it does not touch must stay as it was."""
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return {"steps": [{"method": method}], "grid": grid, "dtype": "keep"} | more


def dense(family: str, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, FAMILIES[family].auto).from_pretrained(folder)
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def run(source: Path, out: Path, what: dict[str, Any]) -> list[LayerResult]:
    with families.one_thread():
        return list(compress(source, what, out, samples=32, seq_len=families.WINDOW))


def modules(names: set[str]) -> set[str]:
    """Parameter names -> module names, but fused experts by their parameter."""
    return {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_found(family: str, built: Folder, tmp_path: Path) -> None:
    made = plan(built(family), "rtn-w4g32", tmp_path / "out")
    assert modules(set(made.layers)) == families.linears(family)
    assert {layer.kind for name, layer in made.layers.items() if FUSED.search(name)} <= {"experts"}
    assert {layer.kind for layer in made.layers.values()} == (
        {"conv1d"} if family == "gpt2" else {"linear", "experts"} if family in PER_EXPERT else {"linear"}
    )
    config = dense(family, built(family)).config
    assert made.blocks == config.num_hidden_layers * (2 if FAMILIES[family].encoder_decoder else 1)
    assert len(made.stacks) == (2 if FAMILIES[family].encoder_decoder else 1)
    assert not any((tmp_path / "out").glob("*")), "a plan writes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_block_by_block_is_the_model(family: str, built: Folder) -> None:
    """No embedding, mask, position or encoder state may be missed: the logits are the model's own."""
    model, windows = dense(family, built(family)), families.held_out(4)
    from hfquant.model.inputs import model_inputs

    with torch.no_grad():
        wanted = model(**model_inputs(model.config, windows)).logits
    streamed = torch.cat(list(stream_logits(open_source(built(family)), windows, dtype=torch.float32, batch=3)))
    torch.testing.assert_close(streamed, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def replaced(family: str, names: set[str]) -> set[str]:
    """Names of the source's tensors that a recipe for all linear layers replaces."""
    layers = {f"{name}.weight" for name in families.linears(family) if not FUSED.search(name)}
    experts = {name for name in names if family in PER_EXPERT and re.search(PER_EXPERT[family], name)}
    return layers | experts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_replaced_is_carried_over(family: str, built: Folder, tmp_path: Path) -> None:
    source, out = built(family), tmp_path / "out"
    run(source, out, recipe("rtn", 5, 48, symmetric=False))  # 5 bit, and a short last group: native
    before, after = tensors(source), tensors(out)
    gone = replaced(family, set(before))
    assert gone <= set(before)
    for name in set(before) - gone:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    parts = {name + suffix for name in gone for suffix in ("", "_scale", "_zero_point")}
    assert set(after) == (set(before) - gone) | parts
    files = {file.name for file in source.iterdir()}
    assert {file.name for file in out.iterdir()} == files | {"report.json"}
    for file in files - {"config.json", "model.safetensors"}:
        assert (out / file).read_bytes() == (source / file).read_bytes(), file
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert {k: v for k, v in now.items() if k not in ("quantization_config", "dtype")} == {
        k: v for k, v in was.items() if k != "dtype"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_lands_where_it_came_from(family: str, built: Folder, tmp_path: Path) -> None:
    """8 bit, loaded and made dense again: each parameter is itself up to rounding, the rest exactly."""
    out = tmp_path / "out"
    results = run(built(family), out, recipe("rtn", 8, symmetric=True, format="native"))
    assert modules({r.name for r in results}) == families.linears(family)
    original = dense(family, built(family))
    loaded = hfquant.dequantize(hfquant.load(out, dtype=torch.float32), torch.float32)
    assert type(loaded) is type(original)
    there = dict(loaded.named_parameters())
    changed = {r.name for r in results}
    for name, parameter in original.named_parameters():
        if name not in changed:
            assert torch.equal(there[name], parameter), name
            continue
        error = (there[name] - parameter).norm() / parameter.norm()
        assert 0 < error < 0.01, name


def test_a_recipe_that_keeps_everything_is_refused(built: Folder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leaves every layer of this model as it is"):
        plan(built("llama"), recipe("rtn", 4, keep=["*"]), tmp_path / "out")


def test_one_layer_alone(built: Folder, tmp_path: Path) -> None:
    source, out = built("llama"), tmp_path / "out"
    alone = "model.layers.1.mlp.up_proj"
    keep = sorted(families.linears("llama") - {alone})
    (result,) = run(source, out, recipe("rtn", 4, keep=keep, format="native"))
    assert result.name == f"{alone}.weight"
    before, after = tensors(source), tensors(out)
    assert set(before) ^ set(after) == {f"{alone}.weight_scale"}
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert set(before) - same == {f"{alone}.weight"}


@pytest.mark.parametrize("family", sorted(PER_EXPERT))
def test_tokens_of_every_expert_are_counted(family: str, built: Folder, tmp_path: Path) -> None:
    """4 samples of 8 tokens leave every expert short of what a Hessian needs, and the report says by how much."""
    with families.one_thread():
        results = list(compress(built(family), recipe("gptq", 4), tmp_path / "out", samples=4, seq_len=8))
    fused = [r for r in results if r.kind == "experts"]
    assert modules({r.name for r in fused}) == {n for n in families.linears(family) if FUSED.search(n)}
    assert all(any("experts that fewer than" in note for note in r.notes) for r in fused)
    config = dense(family, built(family)).config
    assert all(r.shape[1] in (config.hidden_size, 64, 96) for r in fused)


class Scored:
    """A trained model and its held-out perplexity under recipes, each computed once."""

    def __init__(self, family: str, source: Path, work: Path) -> None:
        self.family, self.source, self.work = family, source, work
        self.original = families.perplexity(dense(family, source))
        self._known: dict[str, float] = {}

    def packed(self, method: str, bits: int, group_size: int = 32) -> PreTrainedModel:
        out = self.work / f"{method}-{bits}-{group_size}"
        if not out.exists():
            run(self.source, out, recipe(method, bits, group_size))
        model: PreTrainedModel = hfquant.load(out, dtype=torch.float32)
        return model.eval()

    def perplexity(self, method: str, bits: int, group_size: int = 32) -> float:
        key = f"{method}-{bits}-{group_size}"
        if key not in self._known:
            self._known[key] = families.perplexity(self.packed(method, bits, group_size))
        return self._known[key]


@pytest.fixture(scope="module")
def scored(trained: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scored]:
    known: dict[str, Scored] = {}

    def of(family: str) -> Scored:
        if family not in known:
            known[family] = Scored(family, trained(family), tmp_path_factory.mktemp(family))
        return known[family]

    return of


@pytest.mark.parametrize("family", TRAINED)
def test_training_leaves_something_to_lose(family: str, scored: Callable[[str], Scored]) -> None:
    assert 1 < scored(family).original < 12  # of 260 tokens


@pytest.mark.parametrize("family", TRAINED)
def test_four_bits_cost_little_and_load_as_simulated(family: str, scored: Callable[[str], Scored]) -> None:
    model = scored(family).packed("gptq", 4)
    packed = families.perplexity(model)
    simulated = families.perplexity(hfquant.dequantize(copy.deepcopy(model), torch.float32))
    assert packed == pytest.approx(simulated, rel=5e-3)
    assert scored(family).original * 0.99 < packed < scored(family).original * 1.10


@pytest.mark.parametrize("family", TRAINED)
def test_gptq_beats_rounding_at_three_bits(family: str, scored: Callable[[str], Scored]) -> None:
    model = scored(family)
    gptq, rtn = model.perplexity("gptq", 3, -1), model.perplexity("rtn", 3, -1)
    assert model.original < gptq
    assert gptq - model.original < 0.9 * (rtn - model.original)
