"""Sizes are exact where a recipe says something of its own, and where a file is stored in an unusual way."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hfquant import compress, plan
from hfquant.budget import decide, open_case, table_of
from hfquant.budget.decide import as_recipe

from .making import SMALL, Folders, made


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_roles_that_a_recipe_names_stay(trained: Folders, tmp_path: Path) -> None:
    """What `@attention` says is not chosen for: as little as what a glob says."""
    recipe = {"budget": {"average_bits": 5}, "overrides": {"@attention": "w8g64"}}
    case = open_case(trained("llama"), recipe, tmp_path / "out", **SMALL)
    inside = [row for row in case.table.rows if ".self_attn." in row.layer]
    assert inside
    assert all([option.name for option in row.options] == ["w8g64sym"] for row in inside)
    decision = decide(table_of(case), case.recipe)
    assert made(trained("llama"), decision.recipe, tmp_path / "out") <= decision.nbytes


def test_coarse_grids_are_there_with_and_without_a_zero_point(built: Folders, tmp_path: Path) -> None:
    case = open_case(built("llama"), {"budget": {"average_bits": 4, "groups": [32]}}, tmp_path / "out", **SMALL)
    (names,) = {tuple(option.name for option in row.options) for row in case.table.rows if row.kind == "linear"}
    both = [f"w{bits}g32{kind}" for bits in (2, 3, 4) for kind in ("sym", "")]
    assert list(names) == [*both, *(f"w{bits}g32sym" for bits in (5, 6, 7, 8)), "kept"]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_steps_store_beside_weights_is_counted(family: str, method: str, built: Folders, tmp_path: Path) -> None:
    recipe = {"steps": [{"method": method}, {"method": "gptq"}], "budget": {"average_bits": 4}}
    case = open_case(built(family), recipe, tmp_path / "out", **SMALL)
    decision = decide(case.table, case.recipe)
    assert made(built(family), decision.recipe, tmp_path / "out") <= decision.nbytes


def test_a_head_that_is_stored_twice_is_counted_twice_where_it_stays(trained: Folders, tmp_path: Path) -> None:
    """A file may hold the embeddings once more as the head that they are; where they are kept, both are copied."""
    model = copied(trained("llama-tied"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    case = open_case(model, {"budget": {"fit": case_size(model, tmp_path)}}, tmp_path / "out", **SMALL)
    kept = [(row, row.options[-1] if row.kind == "embedding" else row.options[0]) for row in case.table.rows]
    nbytes = case.table.rest + sum(option.nbytes for _, option in kept)
    assert made(model, as_recipe(case.recipe, kept), tmp_path / "out") <= nbytes


def case_size(model: Path, tmp_path: Path) -> int:
    table = open_case(model, {"budget": {"average_bits": 4}}, tmp_path / "look", **SMALL).table
    return table.rest + int(0.6 * (table.original - table.rest))


def test_every_shard_has_a_frame(built: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of several files has several headers."""
    from hfquant.compress import finish

    case = open_case(built("llama"), {"budget": {"average_bits": 4}}, tmp_path / "one", **SMALL)
    one = decide(case.table, case.recipe)
    monkeypatch.setattr(finish, "MAX_SHARD", 20_000)
    case = open_case(built("llama"), {"budget": {"average_bits": 4}}, tmp_path / "out", **SMALL)
    assert case.table.rest > one.table.rest
    for _ in compress(plan(built("llama"), one.recipe, tmp_path / "out", **SMALL)):
        pass
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    assert sum(file.stat().st_size for file in files) <= decide(case.table, case.recipe).nbytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_is_pruned_or_corrected_is_counted(family: str, built: Folders, tmp_path: Path) -> None:
    """Every layer something else: patterns, shares, ranks and both, transposed weights and fused experts among them."""
    budget = {"average_bits": 4, "sparsity": ["2of4", 0.4], "ranks": [2, 5], "groups": [32, 64]}
    case = open_case(built(family), {"budget": budget}, tmp_path / "out", **SMALL)
    chosen, some = [], {}
    for i, row in enumerate(case.table.rows):
        beyond = [option for option in row.options if option.sparsity is not None or option.rank]
        assert bool(beyond) == (row.kind != "embedding")
        if row.kind == "experts":
            assert {option.name for option in beyond} == {f"w{b}g64sym 2of4" for b in (3, 4, 5)}
        option = beyond[i % len(beyond)] if beyond else row.options[0]
        option = some.setdefault(row.layer, option)  # fused experts have one grid
        chosen.append((row, next(o for o in row.options if o.name == option.name)))
    expected = case.table.rest + sum(option.nbytes for _, option in chosen)
    nbytes = made(built(family), as_recipe(case.recipe, chosen), tmp_path / "out")
    assert 0.98 * expected <= nbytes <= expected
