"""Steps that are for some layers only: the others go without, and so does what is stored of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig, compress, plan
from hfquant.errors import RecipeError
from hfquant.recipe import Recipe
from hfquant.tensors.encoding import Encoding, Sparsity

Folders = Callable[[str], Path]
SMALL: dict[str, Any] = {"samples": 8, "seq_len": 64}
RECIPE = {
    "steps": [
        {"method": "sparsegpt", "pattern": "2of4", "only": ["*.down_proj", "*.q_proj"]},
        {"method": "sparsegpt", "sparsity": 0.5, "only": ["@feed_forward:0"]},
        {"method": "gptq"},
        {"method": "lorc", "rank": 2, "only": ["*.0.*.v_proj"]},
        {"method": "lorc", "rank": 4, "only": ["*.v_proj"]},
    ],
    "grid": "w4g32",
}


def wanted(name: str, weights: int) -> Encoding:
    """What the recipe says of a layer of the toy Llama."""
    encoding = Encoding.parse("w4g32sym")
    if name.endswith(("down_proj", "q_proj")):
        return Encoding(encoding.grid, sparsity=Sparsity(2, 4))
    if name.endswith("v_proj"):
        return Encoding(encoding.grid, rank=2 if ".0." in name else 4)
    return Encoding(encoding.grid, sparsity=Sparsity(weights // 2)) if ".0.mlp." in name else encoding


def test_every_layer_goes_its_own_way(trained: Folders, tmp_path: Path) -> None:
    todo = plan(trained("llama"), RECIPE, tmp_path / "out", **SMALL)
    layers = list(compress(todo))
    assert layers
    for layer in layers:
        expected = wanted(layer.name.removesuffix(".weight"), layer.shape[0] * layer.shape[1])
        assert Encoding.parse(layer.encoding) == expected
        assert layer.bytes_after == todo.layers[layer.name].bytes_after, "known before any work"
        assert ("lorc" in dict(layer.trail)) == (expected.rank > 0)
        assert ("sparsegpt" in dict(layer.trail)) == (expected.sparsity is not None)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(stored["groups"]) == 5


def test_the_same_while_loading(trained: Folders) -> None:
    config = HfQuantConfig(RECIPE, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(trained("llama"), quantization_config=config, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            encoding = module.matrix.encoding
            assert encoding == wanted(name, module.in_features * module.out_features), name


def test_it_is_part_of_the_recipe() -> None:
    recipe = Recipe.parse(RECIPE)
    assert Recipe.parse(recipe.to_yaml() and recipe.model_dump(mode="json")) == recipe
    without = Recipe.parse({**RECIPE, "steps": [{"method": "gptq"}]})
    assert "only" not in without.to_yaml()
    assert recipe.hash != Recipe.parse({**RECIPE, "steps": [*RECIPE["steps"][1:]]}).hash  # type: ignore[index]


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([{"method": "gptq", "only": ["*.q_proj"]}], "step `gptq` cannot be for some layers only .*: it rounds"),
        ([{"method": "gptq"}, {"method": "lorc", "only": "*.q_proj"}], "`only` of step `lorc` is not a list"),
        ([{"method": "gptq"}, {"method": "lorc", "only": []}], "`only` of step `lorc` is not a list"),
        ([{"method": "gptq"}, {"method": "lorc", "only": ["@nose"]}], "cannot read `@nose`"),
        ([{"method": "gptq"}, {"method": "lorc"}, {"method": "lorc", "only": ["*.o"]}], "compensate the same weights"),
        ([{"method": "sparsegpt", "pattern": "2of4", "joint": True, "only": ["*.o"]}], "it prunes and rounds"),
    ],
)
def test_mistakes(steps: list[Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Recipe.parse({"steps": steps, "grid": "w4g32"})
