"""With `one_pass` the original model alone is observed: its text goes through every block once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.compress import compress, plan
from hfquant.compress.crew import Devices
from hfquant.errors import RecipeError
from hfquant.methods import gptq
from hfquant.model.inputs import model_inputs
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from hfquant.recipe import Recipe
from tests.compress.folders import digests

SETTINGS = {"samples": 8, "seq_len": 32}
RECIPE = {"steps": [{"method": "gptq", "one_pass": True, "refine": 0}], "grid": "w4g32", "format": "native"}
Folder = Callable[[str], Path]


def read_by_the_original(source: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """2/n Σ x xᵀ of what these modules read when the whole model runs as it is."""
    skeleton = Skeleton(source, torch.float32)
    skeleton.load(list(skeleton.stored))
    sums: dict[str, tuple[Tensor, int]] = {}

    def see(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            before, n = sums.get(name, (0.0, 0))
            sums[name] = before + x.T @ x, n + len(x)

        return look

    for name in names:
        skeleton.model.get_submodule(name).register_forward_pre_hook(see(name))
    with torch.no_grad():
        skeleton.model(**model_inputs(source.config, tokens), use_cache=False)
    return {name: (H * 2 / n).float() for name, (H, n) in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_every_layer_is_solved_with_what_it_reads_in_the_original(
    family: str, built: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[Tensor] = []
    call = gptq.Method.__call__

    def record(self: gptq.Method, layer: Any, *rest: Any) -> Any:
        solved.append(layer.H)
        return call(self, layer, *rest)

    monkeypatch.setattr(gptq.Method, "__call__", record)
    todo = plan(built(family), RECIPE, tmp_path / "out", **SETTINGS)
    names = [row.name.removesuffix(".weight") for row in compress(todo)]
    assert todo.tokens is not None
    expected = read_by_the_original(open_source(built(family)), todo.tokens, names)
    for one, many in ((solved, expected.values()), (expected.values(), solved)):
        for H in one:
            near = min(float((H - other).norm() / other.norm()) for other in many if other.shape == H.shape)
            assert near < 2e-2, "the type of the blocks is all that is between them"


def test_text_goes_through_every_block_once(built: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    calls = 0
    forward = LlamaDecoderLayer.forward

    def count(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += hidden_states.shape[0]
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", count)
    todo = plan(built("llama"), RECIPE, tmp_path / "out", **SETTINGS)
    list(compress(todo))
    blocks = len(todo.stacks[0].blocks)
    assert calls == blocks * (8 + 1) + 1, "all samples, and one to see which layers share inputs; one before the first"


@pytest.mark.parametrize("family", ["llama", "bart", "mixtral"])
def test_stopped_and_gone_on_with(family: str, built: Folder, tmp_path: Path) -> None:
    list(compress(built(family), RECIPE, tmp_path / "calm", **SETTINGS))
    for stop in (1, 9):
        for count, _ in enumerate(compress(built(family), RECIPE, tmp_path / f"{stop}", **SETTINGS), 1):
            if count == stop:
                break
        todo = plan(built(family), RECIPE, tmp_path / f"{stop}", **SETTINGS)
        list(compress(todo))
        assert digests(tmp_path / f"{stop}") == digests(tmp_path / "calm")


def test_two_and_three_that_work_on_it_write_the_same_bytes(built: Folder, tmp_path: Path) -> None:
    for count in (2, 3):
        crew = Devices(["cpu"] * count, parts=3)
        list(compress(built("llama"), RECIPE, tmp_path / f"{count}", crew=crew, **SETTINGS))
    assert digests(tmp_path / "2") == digests(tmp_path / "3")


def test_other_hidden_states_than_the_usual_ones(built: Folder, tmp_path: Path) -> None:
    """Behind blocks that were rounded to 2 bit, layers read something else."""
    rough = RECIPE | {"grid": "w2g32"}
    usual = rough | {"steps": [{"method": "gptq", "true_sequential": False, "match_original": 0, "refine": 0}]}
    for name, recipe in (("one", rough), ("usual", usual)):
        list(compress(built("llama"), recipe, tmp_path / name, **SETTINGS))
    assert digests(tmp_path / "one") != digests(tmp_path / "usual")


@pytest.mark.parametrize(
    ("recipe", "changes", "match"),
    [
        ("gptq-w4g32", ["gptq.one_pass=true", "gptq.match_original=0.5"], "original model alone is observed"),
        ("gptq-w4g32", ["gptq.one_pass=true", "gptq.true_sequential=true"], "original model alone is observed"),
        ("gptq-w4g32+lkd", ["gptq.one_pass=true"], "`lkd` needs the compressed one's"),
        ("sparsegpt-50+gptq-w4g32", ["gptq.one_pass=true"], "`sparsegpt` needs the compressed one's"),
    ],
)
def test_what_it_cannot_go_with(recipe: str, changes: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Recipe.parse(recipe, changes)


def test_what_it_can_go_with() -> None:
    recipe = Recipe.parse("sparsegpt-50+gptq-w4g32", ["gptq.one_pass=true", "sparsegpt.one_pass=true"])
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    assert {step.options["match_original"] for step in recipe.steps} == {0}
