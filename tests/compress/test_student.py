"""LKD in the whole machinery: blocks get closer to the original, whatever they are made of, and bytes are bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfquant
from hfquant.compress import compress, plan
from hfquant.compress.streaming import Passage
from hfquant.errors import RecipeError
from hfquant.methods.lkd import _Lesson
from hfquant.model.inputs import model_inputs
from hfquant.plugin import HfQuantConfig
from hfquant.recipe import Recipe
from tests import families
from tests.compress.folders import digests
from tests.model.test_families import dense, tensors
from tests.plugin.models import load_with_transformers

SETTINGS: dict[str, Any] = {"samples": 16, "seq_len": 64}
MORE = SETTINGS | {"samples": 64}  # what least squares left of a pruned block is not bettered with less
LKD = {"method": "lkd", "steps": 8, "tokens": 256}


def recipe(*steps: dict[str, Any], grid: str = "w3g32", **more: Any) -> dict[str, Any]:
    return {"steps": [*steps], "grid": grid, **more}


def rows(out: Path) -> list[dict[str, Any]]:
    """What the report says of each block's training."""
    report = json.loads((out / "report.json").read_text())
    found: list[dict[str, Any]] = report["compression"]["sites"]
    return found


def distance(out: Path, source: Path, family: str) -> float:
    windows = families.held_out(4)
    with torch.no_grad():
        wanted = dense(family, source)(windows).logits
        return float((hfquant.load(out, dtype=torch.float32)(windows).logits - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("first", "grid", "share"), [("rtn", "w3g32", 0.7), ("gptq", "w2g32", 0.95)])
def test_it_comes_closer_to_the_original_than_what_it_started_from(
    first: str, grid: str, share: float, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """On held-out text: the blocks' outputs, and the logits and the perplexity of the model that is loaded again."""
    source, found = trained("llama"), []
    for name, lessons in (("before", []), ("after", [LKD | {"steps": 40, "tokens": 512}])):
        whole = recipe({"method": first}, *lessons, grid=grid)
        list(compress(source, whole, tmp_path / name, samples=64, seq_len=64))
        model = hfquant.load(tmp_path / name, dtype=torch.float32)
        found.append((distance(tmp_path / name, source, "llama"), families.perplexity(model)))
    taught = rows(tmp_path / "after")
    assert len(taught) == 3
    assert all(0 < row["error"] <= row["error_before"] < 1 for row in taught)
    assert sum(row["error"] for row in taught) < sum(row["error_before"] for row in taught)
    assert found[1][0] < share * found[0][0]
    assert found[1][1] < found[0][1]


def test_random_tokens_help_too(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """The paper's table 7: no text of the model's kind is needed."""
    source = trained("llama")
    given: dict[str, Any] = {"samples": 64, "seq_len": 64, "calibration": "random"}
    list(compress(source, recipe({"method": "rtn"}), tmp_path / "before"))
    list(compress(source, recipe({"method": "rtn"}, LKD | {"steps": 24, "tokens": 512}), tmp_path / "after", **given))
    assert distance(tmp_path / "after", source, "llama") < 0.95 * distance(tmp_path / "before", source, "llama")


FAMILIES = {
    "gpt2": recipe({"method": "gptq"}, LKD),
    "bart": recipe({"method": "rtn"}, LKD | {"optimizer": "sign"}),
    "t5": recipe({"method": "rtn"}, LKD | {"input": "teacher"}),
    "mixtral": recipe({"method": "rtn"}, LKD),
    "opt": recipe({"method": "smoothquant", "steps": 2}, {"method": "rtn"}, LKD, grid="w4g32", activations="a8"),
    "llama": recipe({"method": "sparsegpt", "sparsity": 0.5}, LKD, grid="w16"),
    "bloom": recipe({"method": "rtn"}, {"method": "lorc", "rank": 2}, LKD, activations="a8static"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_block_learns_and_what_ran_is_what_is_stored(
    family: str, uneven: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaded model puts out what the training blocks put out: nothing was rounded a second time."""
    monkeypatch.setattr("hfquant.compress.layout.multiplies_bfloat16", lambda: False)  # compared in float32
    last: dict[str, torch.Tensor] = {}
    run = Passage.run

    def spy(self: Passage, module: Any, block: int, target: Path) -> Any:
        out = run(self, module, block, target)
        last[self.stack.name] = out.read(0, out.samples)
        return out

    monkeypatch.setattr(Passage, "run", spy)
    source, out = uneven(family), tmp_path / "out"
    whole = FAMILIES[family] | {"dtype": "keep", "format": "native"}
    before = tensors(source)
    list(compress(source, whole, out, **MORE))
    lessons = [row for row in rows(out) if row["step"] == "lkd"]
    assert lessons
    assert any(row["best_step"] > 0 for row in lessons)
    assert all(row["error"] <= row["error_before"] for row in lessons)
    after = tensors(out)
    vectors = [name for name, value in before.items() if name in after and value.ndim == 1]
    assert any(not torch.equal(before[name], after[name]) for name in vectors)
    tokens = plan(source, whole, tmp_path / "other", **MORE).tokens
    model = hfquant.load(out, dtype=torch.float32).eval()
    for stack, wanted in last.items():
        got: list[torch.Tensor] = []
        block = model.get_submodule(stack)[-1]  # type: ignore[index]
        handle = block.register_forward_hook(lambda m, a, y, got=got: got.append(y[0] if isinstance(y, tuple) else y))
        with torch.no_grad():
            model(**model_inputs(model.config, tokens))
        handle.remove()
        # a rounded input that falls on the other side of a boundary is a whole step away
        close = 1e-2 if "activations" in whole else 1e-5
        assert float((got[0] - wanted).norm()) < close * float(wanted.norm())


def test_stopped_and_gone_on_it_ends_in_the_same_bytes(built: Callable[[str], Path], tmp_path: Path) -> None:
    whole = recipe({"method": "gptq"}, LKD | {"steps": 4})
    for count, _ in enumerate(compress(built("llama"), whole, tmp_path / "out", **SETTINGS), 1):
        if count == 9:  # in the second of three blocks
            break
    list(compress(built("llama"), whole, tmp_path / "out", **SETTINGS))
    list(compress(built("llama"), whole, tmp_path / "calm", **SETTINGS))
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")


def test_a_model_in_memory_learns_the_same(trained: Callable[[str], Path]) -> None:
    source, windows = trained("llama"), families.held_out(4)
    apart = []
    for steps in ([{"method": "rtn"}], [{"method": "rtn"}, LKD | {"steps": 24, "tokens": 512}]):
        config = HfQuantConfig(recipe(*steps), samples=64, seq_len=64)
        model = load_with_transformers("llama", source, quantization_config=config)
        with torch.no_grad():
            wanted = dense("llama", source)(windows).logits
            apart.append(float((model(windows).logits - wanted).norm() / wanted.norm()))
    assert apart[1] < 0.95 * apart[0]


def test_the_error_after_it_is_in_the_trail(built: Callable[[str], Path], tmp_path: Path) -> None:
    layers = list(compress(built("llama"), recipe({"method": "rtn"}, LKD), tmp_path / "out", **SETTINGS))
    assert all([name for name, _ in layer.trail] == ["rtn", "lkd"] for layer in layers)
    assert all(0 < error < 1 for layer in layers for _, error in layer.trail)
    assert all(layer.method == "lkd" and layer.error == layer.trail[-1][1] for layer in layers)


def test_where_it_may_stand() -> None:
    assert [step.method for step in Recipe.parse("gptq-w3g64+lkd").steps] == ["gptq", "lkd"]
    with pytest.raises(RecipeError, match=r"`lkd`.*trains"):
        Recipe.parse("lkd+gptq-w3g64")
    with pytest.raises(RecipeError, match="makes the model smaller"):
        Recipe.parse("lkd")
    assert [step.method for step in Recipe.parse("lkd-w4g64").steps] == ["rtn", "lkd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lkd.rounding=0", "lkd.scales=0", "lkd.vectors=0"], "nothing is learned"),
        (["lkd.steps=0"], "steps"),
        (["lkd.rounding=0.5"], "rounding"),
        (["lkd.optimizer=sgd"], "optimizer"),
        (["lkd.stpes=3"], "stpes"),
    ],
)
def test_bad_options_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse("gptq-w4g64+lkd", changes)


@pytest.mark.parametrize(("first", "grid", "count"), [("rtn", "w3g32", 80), ("rtn", "w4g32", 40)])
def test_narrow_weights_learn_longer(
    first: str, grid: str, count: int, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the recipe says how long; and the estimate of the time knows."""
    done: list[float] = []
    learn = _Lesson.learn
    monkeypatch.setattr(_Lesson, "learn", lambda self, rate: (done.append(rate), learn(self, rate))[1])
    lesson = {"method": "lkd", "tokens": 64}
    todo = plan(built("llama"), recipe({"method": first}, lesson, grid=grid), tmp_path / "out", samples=4, seq_len=16)
    half = recipe({"method": first}, lesson | {"steps": count // 2}, grid=grid)
    quick = plan(built("llama"), half, tmp_path / "half", samples=4, seq_len=16)
    list(compress(todo))
    assert len(done) == 3 * count
    assert done[:count] == sorted(done[:count], reverse=True)
    assert done[0] == 1
    assert 0 < done[count - 1] < 0.01
    assert quick.estimate.seconds < todo.estimate.seconds
