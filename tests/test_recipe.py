"""Recipes: one meaning per name, nothing ignored, every mistake named with its place and a way out."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from hfquant import methods
from hfquant.errors import RecipeError
from hfquant.recipe import GridSpec, Recipe
from hfquant.recipe_names import read_name
from hfquant.recipe_schema import json_schema
from hfquant.recipe_source import expand, presets

PLAIN = {"steps": [{"method": "rtn"}], "grid": "w4g64"}


def test_shorthand_and_long_form_are_the_same_work() -> None:
    long = {"steps": [{"method": "gptq"}], "grid": {"bits": 3, "group_size": 64, "symmetric": False}}
    assert Recipe.parse("gptq-w3g64").hash == Recipe.parse(long).hash


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("rtn-w4g64", (4, 64, True)),
        ("rtn-w8", (8, -1, True)),
        ("rtn-w3g64", (3, 64, False)),
        ("rtn-w3g100sym", (3, 100, True)),
        ("rtn-w4g128asym", (4, 128, False)),
        ("rtn-w5asym", (5, -1, False)),
        ("RTN-W4A16G32", (4, 32, True)),  # 16-bit activations are activations left alone
        ("rtn-w2g7", (2, 7, False)),
    ],
)
def test_grid_of_a_name(name: str, grid: tuple[int, int, bool]) -> None:
    spec = Recipe.parse(name).grid
    assert (spec.bits, spec.group_size, spec.symmetric) == grid
    assert (spec.grid().bits, spec.grid().group_size, spec.grid().symmetric) == grid


@pytest.mark.parametrize(
    ("name", "methods", "grid", "activations"),
    [
        ("rtn-w4g64", ["rtn"], "w4g64sym", None),
        ("gptq-w8", ["gptq"], "w8sym", None),
        ("gptq-w3g64", ["gptq"], "w3g64", None),
        ("smoothquant-w8a8", ["smoothquant", "rtn"], "w8sym", 8),
        ("zeroquant-w4a8", ["zeroquant"], "w4sym", 8),
        ("sparsegpt-50", ["sparsegpt"], "w16sym", None),
        ("sparsegpt-2of4-w4g64", ["sparsegpt"], "w4g64sym", None),
        ("lorc-w3g64", ["rtn", "lorc"], "w3g64", None),
        ("gptq-w3g64+lkd", ["gptq", "lkd"], "w3g64", None),
        ("sparsegpt-2of4+gptq-w4g128+lorc-r8", ["sparsegpt", "gptq", "lorc"], "w4g128sym", None),
    ],
)
def test_names_say_which_steps_and_which_numbers(
    name: str, methods: list[str], grid: str, activations: int | None
) -> None:
    recipe = Recipe.parse(name)
    assert [step.method for step in recipe.steps] == methods
    assert str(recipe.grid.grid()) == grid
    assert (recipe.activations and recipe.activations.bits) == activations


def test_grammar_is_read_in_full() -> None:
    steps = read_name("sparsegpt-2of4+smoothquant-w8a8+lorc-r8")
    assert [(step.method, step.what) for step in steps] == [
        ("sparsegpt", "2of4"),
        ("smoothquant", None),
        ("lorc", "r8"),
    ]
    assert [step.numbers is None for step in steps] == [True, False, True]
    numbers = steps[1].numbers
    assert numbers is not None
    assert (numbers.bits, numbers.activations, numbers.group_size) == (8, {"bits": 8}, -1)
    assert read_name("sparsegpt-2of4-w4g64")[0].what == "2of4"


@pytest.mark.parametrize("name", presets())
def test_preset_means_what_its_name_says(name: str) -> None:
    preset = Recipe.parse(name)
    assert preset.name == name
    assert preset.description
    assert preset.hash == Recipe.parse(expand(name)).hash


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        "gptq-w3g64", ["overrides.*.down_proj=w8", "keep=['*.0.*']", "embeddings=w8g64", "gptq.damp=1e-3"]
    )
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.parse(path) == recipe
    assert Recipe.parse(str(path)).hash == recipe.hash
    assert Recipe.parse(recipe) == recipe


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    assert Recipe.parse(path).name == "small"


def test_hash_is_of_the_work_alone() -> None:
    recipe = Recipe.parse("gptq-w4g64")
    assert recipe.hash == Recipe.parse("gptq-w4g64", ["name=x", "description=y", "gate.max_ppl_ratio=9"]).hash
    others = [
        "bits=3",
        "group_size=32",
        "symmetric=false",
        "gptq.damp=0.02",
        "seed=1",
        "keep=[a]",
        "format=native",
    ]
    assert len({Recipe.parse("gptq-w4g64", [change]).hash for change in others} | {recipe.hash}) == 8


def test_hash_is_stable() -> None:
    """Interrupted runs are recognised by it: if this changes, say in the changelog that they start again."""
    assert Recipe.parse("rtn-w4g64").hash == "076fc4fbb747d822"


def test_order_of_overrides_decides_and_is_hashed() -> None:
    one = Recipe.parse(PLAIN | {"overrides": {"*.0.*": "w8", "*.up": None}})
    other = Recipe.parse(PLAIN | {"overrides": {"*.up": None, "*.0.*": "w8"}})
    assert one.grid_for("h.0.up") == GridSpec(bits=8, group_size=-1)
    assert other.grid_for("h.0.up") is None
    assert one.hash != other.hash


def test_grid_for() -> None:
    recipe = Recipe.parse(PLAIN | {"overrides": {"*.down": {"bits": 3}, "*.up": None}, "keep": ["*.0.*"]})
    assert recipe.grid_for("h.1.q") == GridSpec(bits=4, group_size=64, symmetric=True)
    assert recipe.grid_for("h.1.down") == GridSpec(bits=3, group_size=64, symmetric=False)  # the group is inherited
    assert recipe.grid_for("h.1.up") is None
    assert recipe.grid_for("h.0.down") is None
    assert recipe.grid_for("wte", "embedding") is None
    assert recipe.grid_for("lm_head", "head") is None
    both = Recipe.parse(PLAIN | {"embeddings": {"bits": 8}})
    assert both.grid_for("lm_head", "head") == both.grid_for("wte", "embedding") == GridSpec(bits=8, group_size=64)


def test_set_changes() -> None:
    recipe = Recipe.parse("gptq-w4g64", ["bits=3", "calibration.samples=16", "seq_len=32", "steps.0.damp=0.05"])
    assert recipe.grid == GridSpec(bits=3, group_size=64, symmetric=False)
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (16, 32)
    assert recipe.steps[0].options["damp"] == 0.05
    assert recipe.name == "gptq-w4g64 with bits=3, calibration.samples=16, seq_len=32, steps.0.damp=0.05"


def test_later_override_is_asked_first() -> None:
    recipe = Recipe.parse(PLAIN | {"overrides": {"*.up": "w8"}}, ["overrides.h.0.*=null"])
    assert recipe.grid_for("h.0.up") is None
    assert recipe.grid_for("h.1.up") == GridSpec(bits=8, group_size=-1)


def test_options_are_complete_and_buildable() -> None:
    step = Recipe.parse("rtn-w4").steps[0]
    assert step.options == {"search": 40}
    assert step.build() == methods.load("rtn")(search=40)


def test_needs_calibration() -> None:
    assert not Recipe.parse("rtn-w4").needs_calibration
    assert Recipe.parse("gptq-w4").needs_calibration


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse("rtn-w4").name = "other"  # type: ignore[misc]


ACTIVATIONS = [
    ("gptq-w4a8g64", (8, "token", -1, None), (4, 64)),
    ("rtn-w8a8", (8, "token", -1, None), (8, -1)),
    ("rtn-w8a8static", (8, "static", -1, None), (8, -1)),
    ("rtn-w4g64a8g32", (8, "group", 32, None), (4, 64)),
    ("rtn-w4g64a8tensorasym", (8, "tensor", -1, False), (4, 64)),
    ("rtn-w4a4g128", (4, "token", -1, None), (4, 128)),
    ("rtn-w4asyma8sym", (8, "token", -1, True), (4, -1)),
]


@pytest.mark.parametrize(("name", "activations", "grid"), ACTIVATIONS, ids=[name for name, *_ in ACTIVATIONS])
def test_activations_of_a_name(name: str, activations: tuple[object, ...], grid: tuple[int, int]) -> None:
    recipe = Recipe.parse(name)
    spec = recipe.activations
    assert spec is not None
    assert (spec.bits, spec.per, spec.group_size, spec.symmetric) == activations
    assert (recipe.grid.bits, recipe.grid.group_size) == grid
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("text", ["a8", "a8g64", "a8tensor", "a6static", "a8tokenasym", "a4g32sym"])
def test_activations_as_text_are_those_of_an_encoding(text: str) -> None:
    """What a recipe says and what a checkpoint says is written alike."""
    spec = Recipe.parse(PLAIN | {"activations": text}).activations
    assert spec is not None
    said = str(spec.build())
    again = Recipe.parse(PLAIN | {"activations": said}).activations
    assert again is not None
    assert again.build() == spec.build()


def test_activations_change_the_hash_and_none_does_not() -> None:
    assert Recipe.parse(PLAIN | {"activations": None}).hash == Recipe.parse(PLAIN).hash == "076fc4fbb747d822"
    assert len({Recipe.parse(PLAIN | {"activations": text}).hash for text in ("a8", "a7", "a8g64", "a8static")}) == 4


@pytest.mark.parametrize(
    "name", ["rtn-w8a8kv8", "rtn-w4a8g64kv4", "rtn-w4g64a8g32kv2", "rtn-w3g64symkv8", "rtn-w8a8kv8q8"]
)
def test_cache_of_a_name(name: str) -> None:
    """It says nothing of weights or activations, and only the native format can say it."""
    plain_name, at, cache = name.partition("kv")
    recipe, plain = Recipe.parse(name), Recipe.parse(plain_name)
    assert recipe.kv_cache is not None
    assert str(recipe.kv_cache.build()) == at + cache
    assert (recipe.grid, recipe.activations, plain.kv_cache) == (plain.grid, plain.activations, None)
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.hash != plain.hash
    assert Recipe.parse(plain_name + "kv16").hash == plain.hash


def test_queries_are_said_beside_the_cache() -> None:
    said = {"bits": 8, "queries": 8}
    assert Recipe.parse(PLAIN | {"kv_cache": "kv8q8"}).hash == Recipe.parse(PLAIN | {"kv_cache": said}).hash
    plain = {Recipe.parse(PLAIN | {"kv_cache": cache}).hash for cache in ("kv8", {"bits": 8, "queries": None})}
    assert plain == {"8ee3804e4cfd1dc6"}, "runs that were begun before there were queries would not go on"


def test_symmetry_is_chosen_by_the_inputs_where_not_said() -> None:
    spec = Recipe.parse("rtn-w8a8").activations
    assert spec is not None
    assert (spec.build().symmetric, spec.build(one_sided=True).symmetric) == (True, False)
    spec = Recipe.parse("rtn-w8", ["activations=a8sym"]).activations
    assert spec is not None
    assert spec.build(one_sided=True).symmetric


def test_static_scales_need_text() -> None:
    assert not Recipe.parse("rtn-w8a8").needs_calibration
    assert Recipe.parse("rtn-w8a8static").needs_calibration


def test_low_rank_needs_text_unless_plain() -> None:
    assert Recipe.parse("lorc-w3g64").needs_calibration
    assert not Recipe.parse("lorc-w3g64", ["lorc.weighted=false"]).needs_calibration


def test_bits_at_a_step_that_cannot_round_mean_rounding() -> None:
    assert [step.method for step in Recipe.parse("lorc-w3g64").steps] == ["rtn", "lorc"]
    assert Recipe.parse("lorc-r8-w3g64").hash == Recipe.parse("rtn-w3g64+lorc-r8").hash
    assert [step.method for step in Recipe.parse("gptq-w3g64+lorc-r4").steps] == ["gptq", "lorc"]
    assert Recipe.parse("gptq+lorc-r4-w3g64").hash == Recipe.parse("gptq-w3g64+lorc-r4").hash
    assert Recipe.parse("lorc-auto-w3g64").steps[1].options["rank"] == 0


def test_more_bits_for_attention() -> None:
    recipe = Recipe.parse("gptq-w3w4g64")
    assert recipe.overrides == {"@attention": GridSpec(bits=4, group_size=64)}
    assert recipe.grid == GridSpec(bits=3, group_size=64)


class Prune(BaseModel):
    """Stands for a method that prunes, and can round in the same pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "prune"
    needs_hessian: ClassVar[bool] = True
    joint: bool = Field(False, description="round too")


class Smooth(BaseModel):
    """Stands for a step on whole blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scope: ClassVar[str] = "block"
    needs_hessian: ClassVar[bool] = True


@pytest.fixture
def more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in (("prune", Prune), ("smooth", Smooth)):
        module = types.ModuleType(f"hfquant.methods.{name}")
        module.Method = method  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(methods, "NAMES", sorted([*methods.NAMES, "prune", "smooth"]))


COMPOSED = [
    ("prune", ["prune"], 16, False),
    ("prune+gptq-w4", ["prune", "gptq"], 4, False),
    ("prune-w4", ["prune"], 4, True),
    ("prune-w16", ["prune"], 16, False),
    ("smooth-w8a8", ["smooth", "rtn"], 8, False),
    ("smooth+gptq-w8a8", ["smooth", "gptq"], 8, False),
    ("prune+lorc", ["prune", "lorc"], 16, False),
    ("prune+lorc-w3", ["prune", "rtn", "lorc"], 3, False),
    ("smooth+prune+gptq-w4a8g64+lorc-r4", ["smooth", "prune", "gptq", "lorc"], 4, False),
]


@pytest.mark.usefixtures("more_methods")
@pytest.mark.parametrize(("name", "steps", "bits", "joint"), COMPOSED, ids=[name for name, *_ in COMPOSED])
def test_composition(name: str, steps: list[str], bits: int, joint: bool) -> None:
    recipe = Recipe.parse(name)
    assert [step.method for step in recipe.steps] == steps
    assert recipe.grid.bits == bits
    assert any(step.options.get("joint") for step in recipe.steps) == joint
    assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe


ORDER = [
    ("gptq-w4+prune", "step `prune` prunes, and has to come before `gptq`, which rounds", "`prune`, `gptq`"),
    ("lorc+gptq-w4", "step `gptq` rounds, and has to come before `lorc`, which compensates", "`gptq`, `lorc`"),
    ("prune+smooth+rtn-w4", "step `smooth` prepares blocks, and has to come", "`smooth`, `prune`, `rtn`"),
    ("rtn+gptq-w4", "steps `rtn` and `gptq` round the same weights", "leave one out"),
    ("prune-w4+gptq", "steps `prune` and `gptq` round the same weights", "`joint: false`"),
    ("lorc-w4+lorc-r4", "steps `lorc` and `lorc` compensate the same weights", "leave one out"),
    ("smooth+smooth+rtn-w4", "step `smooth` is there twice", "leave one out"),
    ("smooth", "no step of the recipe makes the model smaller", "rounds or prunes"),
    ("lorc", "no step of the recipe makes the model smaller", "rounds or prunes"),
]


@pytest.mark.usefixtures("more_methods")
@pytest.mark.parametrize(("name", "message", "hint"), ORDER, ids=[name for name, *_ in ORDER])
def test_orders_that_make_no_sense(name: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(name)
    assert error.value.message.startswith(message)
    assert error.value.hint is not None
    assert hint in error.value.hint


NUMBERS = [
    ({"steps": [{"method": "gptq"}]}, "step `gptq` rounds, but the recipe does not say how many bits", "`grid: w4"),
    ({"steps": [{"method": "rtn"}], "grid": "w16"}, "step `rtn` rounds, but", "`grid: w4"),
    ({"steps": [{"method": "prune"}], "grid": "w4"}, "the recipe asks for 4 bit, but none of its", "`joint: true`"),
    ({"steps": [{"method": "lorc"}], "grid": "w4"}, "the recipe asks for 4 bit, but none of its steps rounds", "`rtn`"),
    (PLAIN | {"overrides": {"a": "w16"}}, "`overrides.a` is 16 bit, which is what it was", "null"),
    ({"steps": [{"method": "prune"}], "overrides": {"a": "w4"}}, "`overrides.a` asks for 4 bit, but no step", "`rtn`"),
    (PLAIN | {"overrides": {"@atention": "w8"}}, "cannot read `@atention` as a part of a model", "`@attention`"),
    (PLAIN | {"keep": ["@blocks:x"]}, "cannot read `@blocks:x` as a part of a model", "`:0:4`"),
    (PLAIN | {"keep": ["@blocks:"]}, "cannot read `@blocks:` as a part of a model", "`:0:4`"),
    (PLAIN | {"grid": "w4a8"}, "`w4a8` is more than a grid", "`activations: a8`"),
    (PLAIN | {"grid": "w4kv8"}, "`w4kv8` is more than a grid", "`kv_cache: kv8`"),
    (PLAIN | {"kv_cache": "w8"}, "cannot read `w8` as a cache", "`kv4`"),
    (PLAIN | {"kv_cache": {"bits": 3}}, "`kv_cache.bits` of the recipe cannot be `3`", "8"),
    (PLAIN | {"kv_cache": "kv8q4"}, "`kv_cache.queries` of the recipe cannot be `4`", "8"),
    (PLAIN | {"kv_cache": "kv16q8"}, "`kv_cache.bits` of the recipe cannot be `16`", "8"),
    (PLAIN | {"embeddings": "w4w8"}, "`w4w8` is more than a grid", "overrides"),
    (PLAIN | {"activations": "8"}, "cannot read `8` as activations", "`a8g64`"),
    (PLAIN | {"activations": {"bits": 3}}, "`activations.bits` of the recipe cannot be `3`", "4 to 8"),
    (PLAIN | {"activations": {"per": "group"}}, "`per: group` and a `group_size` go together", "activations"),
    (PLAIN | {"activations": {"per": "token", "group_size": 64}}, "go together, e.g. `a8g64`", "activations"),
    (PLAIN | {"activations": {"clip": 99.9}}, "`clip` is for `per: static`", "activations"),
    (PLAIN | {"activations": {"bit": 8}}, "unknown key `bit` in `activations` of the recipe", "`bits`?"),
]


@pytest.mark.usefixtures("more_methods")
@pytest.mark.parametrize(("data", "message", "hint"), NUMBERS, ids=[message for _, message, _ in NUMBERS])
def test_numbers_that_do_not_fit(data: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(data)
    assert message in error.value.message
    assert error.value.hint is not None
    assert hint in error.value.hint


@pytest.mark.usefixtures("more_methods")
def test_pruned_layers_may_stay_unrounded() -> None:
    recipe = Recipe.parse("prune+gptq-w4g64", ["overrides.*.down_proj=w16"])
    assert recipe.grid_for("h.0.down_proj") == GridSpec(bits=16)
    assert recipe.grid_for("h.0.down_proj") == GridSpec(bits=16, group_size=64, symmetric=False)


def test_import_is_light() -> None:
    code = "import sys, hfquant.recipe; print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_json_schema_knows_every_method() -> None:
    schema = json.loads(json.dumps(json_schema()))
    steps = {step["title"]: step for step in schema["$defs"]["Step"]["oneOf"]}
    assert set(steps) == set(methods.NAMES)
    assert steps["rtn"]["properties"]["search"]["default"] == 40
    assert steps["gptq"]["additionalProperties"] is False


NAMES = [
    ("gptk-w4g64", "unknown method `gptk`\n\nhint: did you mean `gptq`? hfquant has "),
    ("magic-w8a8", "unknown method `magic`\n\nhint: hfquant has "),
    ("gptq-w4a9", "`activations.bits` of recipe `gptq-w4a9` cannot be `9`: should be less than or equal to 8"),
    ("rtn-w4a8+lorc-w4a6", "recipe `rtn-w4a8+lorc-w4a6` has two activations"),
    ("lorc-8-w4", "method `lorc` cannot read `8` in `lorc-8-w4`: write the rank, e.g. `lorc-r8`"),
    ("gptq-r8-w4", "method `gptq` takes nothing between its name and its bits (`r8` in `gptq-r8-w4`)"),
    ("gptq-w9", "`grid.bits` of recipe `gptq-w9` cannot be `9`: should be 2 to 8, or 16: not rounded"),
    ("gptq-w1", "`grid.bits` of recipe `gptq-w1` cannot be `1`: should be greater than or equal to 2"),
    ("gptq-w4g0", "cannot read `w4g0` as bits and group\n\nhint: write `w4g64`"),
    ("gptq-w4x", "cannot read `w4x` as bits and group"),
    ("gptq", "recipe `gptq` does not say how many bits\n\nhint: give bits once, e.g. `gptq-w4g128`"),
    ("rtn-w4+gptq-w3", "recipe `rtn-w4+gptq-w3` has two grids"),
    (
        "rtn-w4+",
        "cannot read `` of `rtn-w4+` as a step of a recipe\n\nhint: write `<method>-w<bits>g<group>`",
    ),
    ("four bits please", "cannot read `four bits please` as a step of a recipe"),
    (
        "missing.yaml",
        "recipe file `missing.yaml` does not exist\n\nhint: `hfquant recipes` lists the presets",
    ),
]


@pytest.mark.parametrize(("name", "text"), NAMES, ids=[name for name, _ in NAMES])
def test_bad_names(name: str, text: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(name)
    assert str(error.value).startswith(text)


DATA = [
    ({"stepz": []}, "unknown key `stepz` in the recipe", "did you mean `steps`?"),
    (
        {"steps": [{"method": "gptq", "act_ordr": True}]},
        "unknown key `act_ordr` in step `gptq`",
        "`act_order`?",
    ),
    ({"steps": [{"method": "rtn", "xyz": 1}]}, "unknown key `xyz` in step `rtn`", "known keys: search"),
    ({"steps": [{"method": "gptk"}]}, "unknown method `gptk`", "did you mean `gptq`?"),
    ({"steps": [{}]}, "a step lacks `method`: {}", "write `- method: gptq`"),
    ({"steps": ["rtn"]}, "`steps.0` of the recipe cannot be `'rtn'`", "methods in the order"),
    ({"steps": []}, "`steps` of the recipe cannot be `[]`", "methods in the order"),
    (
        {"steps": [{"method": "rtn", "search": "40"}]},
        "`search` of step `rtn` cannot be `'40'`",
        "narrower ranges",
    ),
    ({"grid": {"bits": "4"}}, "`grid.bits` of the recipe cannot be `'4'`", "`bits`: 2 to 8"),
    (
        {"grid": {"bits": 4, "groupsize": 64}},
        "unknown key `groupsize` in `grid` of the recipe",
        "`group_size`?",
    ),
    ({"grid": {"bits": 4, "group_size": 0}}, "a group of 0 has no columns", "-1 means the whole row"),
    ({"overrides": {"*.x": {"bitz": 3}}}, "unknown key `bitz` in `overrides.*.x` of the recipe", "`bits`?"),
    ({"calibration": {"sampels": 3}}, "unknown key `sampels` in `calibration` of the recipe", "`samples`?"),
    ({"gate": {"max_ppl_ratio": 0.5}}, "`gate.max_ppl_ratio` of the recipe cannot be `0.5`", "multiple of"),
    ({"keep": "lm_head"}, "`keep` of the recipe cannot be `'lm_head'`", "globs or roles"),
    ({"format": "awq"}, "`format` of the recipe cannot be `'awq'`", "`compressed_tensors`"),
]


@pytest.mark.parametrize(("change", "message", "hint"), DATA, ids=[text for _, text, _ in DATA])
def test_bad_data(change: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(PLAIN | change)
    assert message in error.value.message
    assert error.value.hint is not None
    assert hint in error.value.hint


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(PLAIN | {"stepz": 1, "format": "awq"})
    first, second = error.value.message.splitlines()
    assert first.startswith("`format` of the recipe cannot be `'awq'`: should be 'auto', 'native'")
    assert second == "unknown key `stepz` in the recipe"


CHANGES = [
    ("bits", "cannot read `bits` as a change to the recipe"),
    ("=3", "cannot read `=3` as a change to the recipe"),
    ("bits=abc", "`grid.bits` of recipe `gptq-w4g64` cannot be `'abc'`"),
    ("stepz.0.damp=1", "unknown key `stepz` in the recipe\n\nhint: did you mean `steps`?"),
    ("bitz=3", "unknown key `bitz` in the recipe\n\nhint: did you mean `bits`?"),
    ("damp=1", "unknown key `damp` in the recipe\n\nhint: did you mean `gptq.damp`?"),
    ("steps.3.damp=1", "`steps.3.damp`: there is no `steps.3`\n\nhint: there are 1, counted from 0"),
    ("gptq.dampp=1", "unknown key `dampp` in step `gptq`\n\nhint: did you mean `damp`?"),
    ("name.x=1", "`name.x`: `name` is one value"),
    ("keep=[*.0]", "the value of `keep` line 1 is not YAML"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=[change for change, _ in CHANGES])
def test_bad_changes(change: str, text: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse("gptq-w4g64", [change])
    assert str(error.value).startswith(text)


FILES = [
    ("steps: [", "line 1 is not YAML"),
    ("- a\n- b\n", "is not a mapping of keys to values"),
    ("grid: w4\ngrid: w3\n", "line 1 is not YAML: key `grid` is given twice"),
    ("steps: [{method: gptk}]\ngrid: w4\n", "unknown method `gptk` (in recipe file `"),
    ("steps: [{method: rtn}]\ngrid: w4\nkeeep: []\n", "unknown key `keeep` in recipe file `"),
]


@pytest.mark.parametrize(("content", "text"), FILES, ids=["syntax", "list", "twice", "method", "key"])
def test_bad_files(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as error:
        Recipe.parse(path)
    assert text in error.value.message
    assert str(path) in error.value.message
