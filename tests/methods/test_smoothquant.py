"""SmoothQuant: its factors are the paper's, its search never loses, and outliers no longer decide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.outliers import plant
from hfquant.compress.block import compress_block
from hfquant.compress.blocksteps import prepare
from hfquant.compress.rounding import Reading, Rounding
from hfquant.compress.solve import Work
from hfquant.compress.streaming import Passage, Streamer
from hfquant.errors import RecipeError
from hfquant.methods.awq import Method as Awq
from hfquant.methods.rtn import Method as Rtn
from hfquant.methods.smoothquant import Method, factors
from hfquant.model.blocks import Weight, hidden, weights
from hfquant.model.fold import Folder
from hfquant.model.sites import Site
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from hfquant.recipe import Recipe
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from tests import families

A8 = Reading(Activations(8, "token"))


def test_factors_are_equation_4() -> None:
    """Channel by channel from the equation, in Python's floats; a dead channel keeps its scale."""
    X = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 80, 0.1, 3, 0, 1e-3, 9])
    W = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    for alpha in (0.0, 0.25, 0.5, 0.8, 1.0):
        s = factors(X.abs().amax(0), W.abs().amax(0), alpha)
        for j in range(7):
            x = max(abs(v) for v in X[:, j].tolist())
            w = max(abs(v) for v in W[:, j].tolist())
            expected = 1.0 if x == 0 else max(x**alpha / w ** (1 - alpha), 1e-5)
            assert float(s[j]) == pytest.approx(expected, rel=1e-5)


def test_half_makes_both_sides_equally_hard() -> None:
    """With α = 0.5 the largest input and the largest weight of every channel become the same (paper, section 4)."""
    x, w = torch.rand(32) * 100 + 0.01, torch.rand(32) + 0.01
    s = factors(x, w, 0.5)
    torch.testing.assert_close(x / s, w * s)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    steps = [{"method": "smoothquant", "alpha": alpha}, {"method": "rtn"}]
    with pytest.raises(RecipeError, match=r"`steps\.0\.alpha`|alpha"):
        Recipe.parse({"steps": steps, "grid": "w8"})


def work(found: list[Weight], reading: Reading | None, grid: Grid) -> Work:
    readings = {} if reading is None else {w: reading for w in found}
    return Work({w: grid for w in found}, [("rtn", Rtn(search=0))], torch.float32, readings=readings)


@pytest.fixture(scope="module")
def planted(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """planted("opt") -> the trained model with outliers in four channels of every norm's output."""
    known: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in known:
            known[family] = tmp_path_factory.mktemp("planted") / family
            auto = getattr(families.transformers, families.FAMILIES[family].auto)
            model = auto.from_pretrained(trained(family), dtype=torch.float32).eval()
            before = families.perplexity(model)
            assert plant(model, families.held_out(2), 4, 50.0) > 0
            assert families.perplexity(model) == pytest.approx(before, rel=1e-5)
            families._save(model, known[family])
        return known[family]

    return make


def one_block(folder: Path, at: Path, index: int = 0) -> tuple[nn.Module, Passage]:
    streamer = Streamer(Skeleton(open_source(folder), torch.float32), families.held_out(16), at, batch=8)
    passage = next(streamer.passages())
    for i, name in enumerate(passage.stack.blocks[:index]):
        passage.stream = passage.run(streamer.skeleton.load_module(name), i, at / f"{i}.stream")
    return streamer.skeleton.load_module(passage.stack.blocks[index]), passage


@torch.no_grad()
def output_error(
    folder: Path, at: Path, steps: list[Any], reading: Reading | None, grid: Grid, index: int = 0
) -> float:
    """‖y − ŷ‖ / ‖y‖ of one block's branches (its output without the stream it adds to) when all of it is rounded."""
    block, passage = one_block(folder, at, index)
    before = branches(block, passage, index)
    found = weights(block)
    masters, todo, _ = prepare(block, steps, work(found, reading, grid), passage, index, torch.float32)
    masters = {w: W.clone() for w, W in masters.items()}
    with Rounding(block) as rounding:
        assert len(list(compress_block(block, masters, todo, passage, index, rounding))) == len(found)
        after = branches(block, passage, index)
    assert not any(m._forward_pre_hooks for m in block.modules()), "the hooks are gone"
    return float((after - before).norm() / before.norm())


def branches(block: nn.Module, passage: Passage, index: int) -> Tensor:
    outputs = []
    for batch, (at, n) in enumerate(passage.batches):
        args, kwargs = passage.arguments(index, batch)
        outputs.append(hidden(block(*args, **kwargs)) - passage.stream.read(at, n))
    return torch.cat(outputs)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("per", ["token", "tensor", "static"])
def test_outliers_collapse_naive_w8a8_but_not_smoothquant(
    family: str, per: Any, planted: Callable[[str], Path], tmp_path: Path
) -> None:
    reading, grid, folder = Reading(Activations(8, per)), Grid(8, -1), planted(family)
    naive = output_error(folder, tmp_path / "naive", [], reading, grid)
    fixed = output_error(folder, tmp_path / "fixed", [("smoothquant", Method(alpha=0.5))], reading, grid)
    searched = output_error(folder, tmp_path / "searched", [("smoothquant", Method())], reading, grid)
    assert naive > 0.05
    assert fixed < naive / 3
    assert searched < naive / 3
    assert searched > 0


@torch.no_grad()
def test_the_search_is_never_worse_than_nothing_or_any_fixed_alpha(
    planted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of one site, on the text it was searched on: the error it reports is the least of all."""
    block, passage = one_block(planted("llama"), tmp_path)
    _, _, prepared = prepare(
        block, [("smoothquant", Method(steps=4))], work(weights(block), A8, Grid(8, -1)), passage, 0, torch.float32
    )
    assert {tuple(row["layers"]) for row in prepared.rows} >= {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    assert all(row["error"] < row["error_before"] for row in prepared.rows)
    assert all(row["alpha"] in (0, 0.25, 0.5, 0.75, 1) for row in prepared.rows)


@torch.no_grad()
def test_models_without_a_norm_to_fold_into_divide_their_inputs(tmp_path: Path, built: Callable[[str], Path]) -> None:
    """A model with norms behind its layers: factors go beside the weights, and the block computes the same."""
    block, passage = one_block(built("opt-350m"), tmp_path)
    found = weights(block)
    todo = work(found, None, Grid(16, -1))
    before = branches(block, passage, 0)
    masters, todo, prepared = prepare(block, [("smoothquant", Method(alpha=0.5))], todo, passage, 0, torch.float32)
    divided = {w.module for w in prepared.scales}
    assert divided == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"}
    for weight, s in prepared.scales.items():  # the block itself does not know of them
        torch.testing.assert_close(masters[weight], weight.get(block) * s)
        assert any("divided when it runs" in note for note in todo.notes[weight])
    torch.testing.assert_close(branches(block, passage, 0), before, rtol=1e-4, atol=1e-4)
    q, k, v = (s for w, s in prepared.scales.items() if "self_attn" in w.module)
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    masters = {w: W.clone() for w, W in masters.items()}
    with Rounding(block) as rounding:  # 16 bit weights: what runs is the same again
        for done in compress_block(block, masters, todo, passage, 0, rounding):
            s = prepared.scales.get(done.weight)
            assert (done.Q.input_scale is None) if s is None else torch.equal(done.Q.input_scale, s)  # type: ignore[arg-type]
        torch.testing.assert_close(branches(block, passage, 0), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_format_that_cannot_divide_leaves_them_and_says_so(tmp_path: Path, built: Callable[[str], Path]) -> None:
    from dataclasses import replace

    block, passage = one_block(built("opt-350m"), tmp_path)
    todo = replace(work(weights(block), None, Grid(8, -1)), free=False)
    _, todo, prepared = prepare(block, [("smoothquant", Method(alpha=0.5))], todo, passage, 0, torch.float32)
    assert not prepared.scales
    assert {w.module.rpartition(".")[2] for w in todo.notes} == {"q_proj", "k_proj", "v_proj", "fc1"}
    assert {tuple(row["layers"]) for row in prepared.rows} == {("self_attn.out_proj",), ("fc2",)}


@torch.no_grad()
@pytest.mark.parametrize("free", [True, False], ids=["native", "another format"])
@pytest.mark.parametrize("step", ["smoothquant", "awq"])
def test_a_fold_that_the_proof_rejects_late_is_named(
    step: str, free: bool, tmp_path: Path, trained: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found possible with trial factors, and then the block computed something else with the chosen ones."""
    from dataclasses import replace

    block, passage = one_block(trained("llama"), tmp_path)
    before = branches(block, passage, 0)
    kept = Folder.scale

    def scale(self: Folder, site: Site, s: Tensor) -> Tensor | None:
        return None if site.outer else kept(self, site, s)

    monkeypatch.setattr(Folder, "scale", scale)
    method = Method(alpha=0.5) if step == "smoothquant" else Awq(steps=4)
    todo = replace(work(weights(block), A8, Grid(3, 32)), free=free)
    masters, todo, prepared = prepare(block, [(step, method)], todo, passage, 0, torch.float32)
    rejected = {name for row in prepared.rows if row["into"] in (None, "input") for name in row["layers"]}
    attention = {f"self_attn.{n}_proj" for n in "qkv"}
    assert attention <= rejected <= attention | {"mlp.gate_proj", "mlp.up_proj"}
    assert {w.module for w in todo.notes} == rejected, "and nothing is said of folds that were taken"
    said = "divided when it runs" if free else "not rescaled: with its factors the block computed something else"
    assert all(note.startswith(f"{step}: ") and said in note for (note,) in todo.notes.values())
    assert {w.module for w in prepared.scales} == (rejected if free else set())
    assert not any("norm" in name for name in prepared.changed)
    torch.testing.assert_close(branches(block, passage, 0), before, rtol=1e-4, atol=1e-4)
    for weight in masters:
        if weight.module in rejected and not free:
            assert torch.equal(masters[weight], weight.get(block))


@torch.no_grad()
def test_experts_are_left_alone(tmp_path: Path, built: Callable[[str], Path]) -> None:
    block, passage = one_block(built("mixtral"), tmp_path)
    before = branches(block, passage, 0)
    _, _, prepared = prepare(
        block, [("smoothquant", Method(alpha=0.5))], work(weights(block), A8, Grid(8, -1)), passage, 0, torch.float32
    )
    assert {name for row in prepared.rows for name in row["layers"]} == {
        f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")
    }
    torch.testing.assert_close(branches(block, passage, 0), before, rtol=1e-4, atol=1e-4)
