"""Recipes: one meaning per name, nothing ignored, every mistake named with its place and a way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfquant import methods
from hfquant.errors import RecipeError
from hfquant.recipe import GridSpec, Recipe, json_schema
from hfquant.recipe_names import read_name
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
    assert (numbers.bits, numbers.activation_bits, numbers.group_size) == (8, 8, -1)
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
    ("sparsegpt-2of4+gptq-w4g128+lorc-r8", "unknown method `sparsegpt`"),
    ("gptq-w4a8g64", "method `gptq` quantizes weights only (`a8` in `gptq-w4a8g64`)\n\nhint: leave `a8` out"),
    ("gptq-r8-w4", "method `gptq` takes nothing between its name and its bits (`r8` in `gptq-r8-w4`)"),
    ("gptq-w9", "`grid.bits` of recipe `gptq-w9` cannot be `9`: should be less than or equal to 8"),
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
    ({"keep": "lm_head"}, "`keep` of the recipe cannot be `'lm_head'`", "globs of modules"),
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
