"""The gradients that come back block by block are those of the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hfquant.budget import analysis, outside, passes
from hfquant.budget import walk as walking
from hfquant.budget.candidates import ENDS
from hfquant.budget.door import outlined
from hfquant.compress.layout import lay_out
from hfquant.model.blocks import hidden
from hfquant.model.inputs import model_inputs
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from hfquant.recipe import Recipe
from tests import families

Folders = Callable[[str], Path]
SAMPLES, LENGTH, SEED = 3, 16, 5


class Told(outside.Ends):
    """What is told of the ends: the gradients at the head, and of embeddings, by their order."""

    def __init__(self) -> None:
        self.heads: list[Tensor] = []
        self.tables: list[tuple[Tensor, Tensor]] = []

    def head(self, module: nn.Module, h: Tensor, gradient: Tensor) -> None:
        self.heads.append(gradient.detach().clone())

    def embedded(self, module: nn.Module, ids: Tensor, gradient: Tensor) -> None:
        self.tables.append((ids, gradient))


def by_token(pairs: list[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Gradients of looked-up embeddings -> of the table."""
    total = torch.zeros(rows, pairs[0][1].shape[-1])
    for ids, gradient in pairs:
        total.index_add_(0, ids.flatten(), gradient.reshape(-1, gradient.shape[-1]))
    return total


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "t5", "bart"])
def test_gradients_are_those_of_the_whole_model(family: str, uneven: Folders, tmp_path: Path) -> None:
    source = open_source(uneven(family))
    tokens = families.held_out()[:SAMPLES, :LENGTH].clone()
    walk = walking.forward(Skeleton(source, torch.float32), tokens, tmp_path / "walk")
    told, seen = Told(), []

    def see(name: str, block: nn.Module, back: passes.Backward) -> None:
        seen.append(name)
        back.run(lambda n: None)

    passes.backward(walk, SEED, see, told)
    model = families.random_model(family)
    model = type(model).from_pretrained(uneven(family), dtype=torch.float32).eval()
    table: nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight]
    looked: list[tuple[Tensor, Tensor]] = []

    def leaf(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        looked.append((args[0], output.detach().requires_grad_()))
        return looked[-1][1]

    for one in tables:
        one.register_forward_hook(leaf)
    for p in model.parameters():
        p.requires_grad_(False)
    found = []
    for (at, n), head in zip(walk.streamer.batches, told.heads, strict=True):
        looked.clear()
        logits = model(**model_inputs(source.config, tokens[at : at + n]), use_cache=False).logits
        logits.backward(head)  # the same tokens drawn
        scale = float(getattr(tables[0], "embed_scale", 1.0))
        found += [(ids, out.grad * scale) for ids, out in looked if out.grad is not None]
    wanted = by_token(found, table.num_embeddings)
    got = by_token(told.tables, table.num_embeddings)
    assert wanted.norm() > 0
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert sorted(seen) == sorted(name for p in walk.passages for name in p.stack.blocks)
    assert not list((tmp_path / "walk").glob("*.gradient*beside*")), "gradients of later stacks are gone"


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = outside.sampled(p.expand(20_000, -1), torch.Generator().manual_seed(0))
    share = drawn.flatten().bincount(minlength=len(p)) / len(drawn)
    assert torch.equal(share == 0, p == 0)
    assert torch.allclose(share, p, atol=0.015)  # four standard deviations


def test_drawn_tokens_are_the_models_own(uneven: Folders, tmp_path: Path) -> None:
    """At the head a gradient is p − 1 for the token drawn and p for all others: each row sums to zero."""
    walk = walking.forward(
        Skeleton(open_source(uneven("llama")), torch.float32), families.held_out()[:2, :LENGTH], tmp_path / "walk"
    )
    told = Told()
    passes.backward(walk, SEED, lambda name, block, back: back.run(lambda n: None), told)
    for gradient in told.heads:
        assert torch.allclose(gradient.sum(-1), torch.zeros(gradient.shape[:-1]), atol=1e-5)
        assert torch.equal((gradient < 0).sum(-1), torch.ones(gradient.shape[:-1], dtype=torch.int64))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_some_are_taken_back_and_layers_learn_from_the_others(
    family: str, uneven: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the first samples are what they are without the others, which alone are looked at."""
    source, tokens = open_source(uneven(family)), families.held_out()[:12, :LENGTH].clone()
    monkeypatch.setattr(walking, "TOGETHER", 2 * LENGTH)  # batches of 1, 2, 2 ..
    few = walking.forward(Skeleton(source, torch.float32), tokens[:5], tmp_path / "few")
    walk = walking.forward(Skeleton(source, torch.float32), tokens, tmp_path / "walk", judged=6)
    assert [n for _, _, n in walk.back()] == [1, 2, 2], "whole batches"
    assert walk.judged == 5
    assert [walk.streamer.batches[i] for i in walk.learned()] == [(5, 2), (7, 2), (9, 2), (11, 1)]
    assert list(few.learned()) == [0, 1, 2]
    alone, among, looked = Told(), Told(), []

    def see(name: str, block: nn.Module, back: passes.Backward) -> None:
        looked.clear()
        watch = block.register_forward_hook(lambda module, args, output: looked.append(len(hidden(output))))
        back.look()
        watch.remove()
        assert looked == [2, 2, 2, 1]
        back.run(lambda n: None)

    passes.backward(few, SEED, lambda name, block, back: back.run(lambda n: None), alone)
    passes.backward(walk, SEED, see, among)
    pairs = zip(alone.heads + [g for _, g in alone.tables], among.heads + [g for _, g in among.tables], strict=True)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in pairs)


def test_sequences_are_divided() -> None:
    tokens = torch.arange(100)[:, None].expand(-1, 3)
    used, judged = analysis._divided(tokens, analysis.LEARNED)
    assert judged == analysis.SEQUENCES
    assert len(used) == judged + analysis.LEARNED == len(used[:, 0].unique())
    assert [analysis._divided(tokens[:n], analysis.LEARNED)[1] for n in (1, 2, 3, 12, 47, 48)] == [1, 1, 1, 4, 15, 16]
    used, judged = analysis._divided(tokens[:1], analysis.LEARNED)
    assert len(used) == judged == 1, "of a single sequence both"
    used, judged = analysis._divided(tokens, 0)
    assert len(used) == judged == analysis.SEQUENCES


def test_wide_layers_learn_from_more(built: Folders) -> None:
    """H of a layer needs more tokens than it has columns."""
    recipe = Recipe.parse({"name": "gptq", "budget": {"average_bits": 4}})
    laid = lay_out(open_source(built("llama")), outlined(recipe))
    widest = max(target.shape[1] for target in laid.targets.values() if target.kind not in ENDS)
    assert analysis.learning(laid, recipe, 512) == analysis.LEARNED
    assert analysis.learning(laid, recipe, 1) == analysis.COLUMN * widest
    nearest = Recipe.parse({"steps": [{"method": "rtn"}], "budget": {"average_bits": 4}})
    assert analysis.learning(laid, nearest, 1) == 0
