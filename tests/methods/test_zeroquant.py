"""ZeroQuant: rounding to nearest in groups, 8-bit activations unless the recipe says otherwise."""

import pytest
import torch

from hfquant.compress.selection import select
from hfquant.methods import rtn, zeroquant
from hfquant.recipe import ActivationSpec, GridSpec, Recipe
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.families import random_model


def test_weights_are_rounded_to_nearest() -> None:
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    ours, nearest = (m.Method()(Layer(name="l", W=W), Grid(4, 32), torch.float16).Q for m in (zeroquant, rtn))
    assert ours is not None
    assert nearest is not None
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scale, nearest.scale)


def test_finer_groups_lose_less() -> None:
    """The second paper's point: per row, then 128, 64, 32 columns to a scale."""
    layer = Layer(name="l", W=torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3)
    errors = [zeroquant.Method()(layer, Grid(4, group), torch.float16).error() for group in (-1, 128, 64, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_odd_widths(bits: int) -> None:
    layer = Layer(name="l", W=torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert 0 < zeroquant.Method()(layer, Grid(bits, 32, False), torch.float16).error() < 0.9 * 2.0 ** (1 - bits)


def test_activations_and_embeddings_unless_told_otherwise() -> None:
    recipe = Recipe.parse("zeroquant-w8")
    assert recipe.activations == ActivationSpec()
    assert recipe.activations.build() == Activations(8, "token", -1, True)
    assert recipe.embeddings == GridSpec(bits=8, group_size=-1)
    assert not recipe.needs_calibration
    assert Recipe.parse({"steps": [{"method": "zeroquant"}], "grid": "w8"}).hash == recipe.hash
    weights_only = Recipe.parse("zeroquant-w8a16", ["embeddings=null"])
    assert (weights_only.activations, weights_only.embeddings) == (None, None)
    assert Recipe.parse(weights_only).activations is None
    assert Recipe.parse("zeroquant-w8", ["activations=a8g64"]).activations == ActivationSpec(per="group", group_size=64)
    assert Recipe.parse("zeroquant-w8", ["activations.bits=6"]).activations == ActivationSpec(bits=6)


def test_the_mixture_of_the_paper() -> None:
    targets = select(random_model("gpt2"), Recipe.parse("zeroquant-w4w8a8g64"))
    found = {name: (target.grid.bits, target.activations is not None) for name, target in targets.items()}
    assert found.pop("transformer.wte.weight") == (8, False)
    assert {places for name, places in found.items() if ".attn." in name} == {(8, True)}
    assert {places for name, places in found.items() if ".mlp." in name} == {(4, True)}
