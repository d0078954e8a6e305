"""Which weights a recipe means: roles and ranges are found by looking, and what fits nothing is refused."""

import pytest

from hfquant.compress.selection import Target, expected, select, steps_for
from hfquant.errors import RecipeError
from hfquant.recipe import Recipe
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from tests.families import FAMILIES, linears, random_model

# Written down by looking at the models: what of a name says that a layer belongs to attention.
ATTENTION = {
    "bart": ("attn",),
    "bloom": ("self_attention",),
    "gpt2": (".attn.",),
    "gpt_neo": (".attn.",),
    "gpt_neox": (".attention.",),
    "t5": ("SelfAttention", "EncDecAttention"),
    "flan-t5": ("SelfAttention", "EncDecAttention"),
    "whisper": ("attn",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_found_by_looking(family: str) -> None:
    recipe = Recipe.parse("rtn-w4g32", ["overrides.@attention=w8"])
    found = {name.removesuffix(".weight"): t.grid.bits for name, t in select(random_model(family), recipe).items()}
    signs = ATTENTION.get(family, ("self_attn",))
    assert found == {name: 8 if any(sign in name for sign in signs) else 4 for name in linears(family)}
    assert set(found.values()) == {4, 8}


def bits(*changes: str, family: str = "llama") -> dict[str, int]:
    """Bits of one attention and one feed-forward layer of each block."""
    targets = select(random_model(family), Recipe.parse("rtn-w4g32", changes))
    short = {name.removesuffix(".weight").removeprefix("model.layers."): t for name, t in targets.items()}
    return {name: t.grid.bits for name, t in short.items() if name.endswith(("q_proj", "up_proj"))}


def test_ranges_of_blocks() -> None:
    q, up = "self_attn.q_proj", "mlp.up_proj"
    both = {f"{i}.{leaf}": 4 for i in range(3) for leaf in (q, up)}
    assert bits("overrides.@blocks:0=w8") == both | {f"0.{q}": 8, f"0.{up}": 8}
    assert bits("overrides.@blocks:-1=w8") == both | {f"2.{q}": 8, f"2.{up}": 8}
    assert bits("overrides.@attention:1:=w8") == both | {f"1.{q}": 8, f"2.{q}": 8}
    assert bits("overrides.@feed_forward::-2=w8") == both | {f"0.{up}": 8}
    assert bits("keep=['@blocks:1:3']") == {f"0.{q}": 4, f"0.{up}": 4}
    # an exception inside an exception: the later change is asked first
    assert bits("overrides.@attention=w8", f"overrides.*.1.{q}=w5") == both | {f"0.{q}": 8, f"1.{q}": 5, f"2.{q}": 8}


@pytest.mark.parametrize(
    "change", ["overrides.@blocks:7=w8", "keep=['@attention:3:']", "activations={keep: ['@blocks:9']}"]
)
def test_a_role_that_means_nothing_is_refused(change: str) -> None:
    with pytest.raises(RecipeError, match="means no layer of this model"):
        select(random_model("llama"), Recipe.parse("rtn-w4a8g32", [change]))


def test_activations_of_layers_but_not_of_the_ends() -> None:
    recipe = Recipe.parse("rtn-w4a6g32", ["embeddings=w8", "activations.keep=['*.0.*.down_proj']"])
    targets = select(random_model("llama"), recipe)
    unrounded = {name for name, target in targets.items() if target.activations is None}
    assert unrounded == {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"}
    assert targets["model.layers.1.mlp.down_proj.weight"].activations == Activations(6, "token", -1, True)


def test_a_rank_that_no_weight_can_have() -> None:
    model = random_model("llama")
    with pytest.raises(
        RecipeError, match=r"step `lorc` does not fit `model.layers.0.self_attn.k_proj`: a weight of 32 x 64"
    ):
        select(model, Recipe.parse("lorc-r33-w3g32"))
    small = select(model, Recipe.parse("lorc-r33-w3g32", ["keep=['*.k_proj', '*.v_proj']"]))
    assert small["model.layers.0.self_attn.q_proj.weight"].grid == Grid(3, 32, False)


def test_options_by_layer_mean_layers_of_the_whole_model() -> None:
    recipe = Recipe.parse(
        "sparsegpt-50", ["sparsegpt.ratios={'@blocks:0': 0, 'model.layers.1.*': 0.25, '@feed_forward': 0.75}"]
    )
    model = random_model("llama")
    shares = {}
    for name, target in select(model, recipe).items():
        sparsity = expected(target, recipe).sparsity
        out, n = target.shape
        shares[name.removeprefix("model.layers.").removesuffix("_proj.weight")] = (
            None if sparsity is None else 1 - sparsity.n / (out * n)
        )
    assert shares["0.mlp.up"] is shares["0.self_attn.q"] is None
    assert (shares["1.mlp.up"], shares["1.self_attn.q"]) == (0.25, 0.25)
    assert (shares["2.mlp.up"], shares["2.self_attn.q"]) == (0.75, 0.5)


@pytest.mark.parametrize("role", ["@blocks:9", "@attention:7:"])
def test_options_by_layer_that_mean_nothing_are_refused(role: str) -> None:
    recipe = Recipe.parse("sparsegpt-50", [f"sparsegpt.ratios={{'{role}': 0.3}}"])
    with pytest.raises(RecipeError, match=f"^`{role}` of recipe .* means no layer of this model"):
        select(random_model("llama"), recipe)
    with pytest.raises(RecipeError, match=r"cannot read `@atention` as a part of a model\n\nhint: write `@attention`"):
        Recipe.parse("sparsegpt-50", ["sparsegpt.ratios={'@atention': 0.3}"])


def test_rows_that_end_inside_a_pattern() -> None:
    model = random_model("llama")
    with pytest.raises(
        RecipeError,
        match=r"step `sparsegpt` does not fit `model.layers.0.self_attn.q_proj`: 64 columns are not whole patterns of 5"
        r"[^\n]*\n\nhint: change the step's options, or leave the layer out with `--set keep=",
    ):
        select(model, Recipe.parse("sparsegpt-3of5"))
    left_out = Recipe.parse("sparsegpt-3of5+rtn-w4g32", ["sparsegpt.ratios={'@blocks': 0}"])
    assert {expected(t, left_out).sparsity for t in select(model, left_out).values()} == {None}


def test_experts_that_no_step_is_for_stay_as_they_are() -> None:
    pruned = select(random_model("mixtral"), Recipe.parse("sparsegpt-50"))
    assert {target.kind for target in pruned.values()} == {"linear"}
    rounded = select(random_model("mixtral"), Recipe.parse("sparsegpt-50+gptq-w4g32"))
    assert {target.kind for target in rounded.values()} == {"linear", "experts"}
    with pytest.raises(RecipeError, match="leaves every layer of this model as it is"):
        select(random_model("mixtral"), Recipe.parse("sparsegpt-50", ["keep=['@attention']"]))


def test_experts_go_without_and_are_not_checked() -> None:
    targets = select(random_model("mixtral"), Recipe.parse("lorc-r40-w3g32", ["keep=['@attention']"]))
    assert {target.kind for target in targets.values()} == {"experts"}


@pytest.mark.parametrize(
    ("kind", "grid", "steps"),
    [
        ("linear", Grid(3, 32, False), ["gptq", "lorc"]),
        ("experts", Grid(3, 32, False), ["gptq"]),
        ("linear", Grid(16, -1), ["lorc"]),
        ("embedding", Grid(8, -1), ["rtn"]),
        ("head", Grid(8, -1), ["rtn"]),
    ],
)
def test_steps_of_a_weight(kind: str, grid: Grid, steps: list[str]) -> None:
    target = Target("x.weight", "x", kind, (64, 64), grid)
    found = steps_for(target, Recipe.parse("gptq-w3g32+lorc-r4"))
    assert [type(method).__module__.rpartition(".")[2] for method in found] == steps
