"""What a model folder may look like, and how a damaged one is told from a sound one."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hfquant
from hfquant.compress import compress, plan
from hfquant.errors import SourceError
from hfquant.model.headers import read_header
from hfquant.model.source import open_source
from hfquant.recipe import Recipe

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(built: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("llama"), tmp_path / "model"))


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[NAME].update(shape=[3, 3]),
        lambda h: h[NAME].update(shape="wide"),
        lambda h: h[NAME].update(data_offsets=[5]),
        lambda h: h[NAME].pop("dtype"),
        lambda h: h.update({NAME: 7}),
        lambda h: h[NAME].update(shape=[-1, -9]),
    ],
)
def test_a_header_that_cannot_be_is_named(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with_header(model / WEIGHTS, change)
    with pytest.raises(SourceError, match="damaged"):
        read_header(model / WEIGHTS)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {"a": 1}}', "{", "null"])
def test_an_index_without_a_map_is_refused(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="does not say which file"):
        open_source(model)


def test_a_second_copy_of_the_weights_is_not_read_nor_carried(model: Path, tmp_path: Path) -> None:
    save_file({"output.weight": torch.zeros(3)}, model / "consolidated.safetensors")
    (model / "model.safetensors.index.fp32.json").write_text("{}")
    source = open_source(model)
    assert "output.weight" not in source.tensors
    assert not [f.name for f in source.files if "safetensors" in f.name]


def test_folders_are_carried_and_code_is_not(model: Path, tmp_path: Path) -> None:
    templates = model / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"0")
    (model / "modeling_x.py").write_text("print()")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    list(compress(model, "rtn-w4g32", tmp_path / "out"))
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "onnx").exists()
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("recipe", ["rtn-w4g32", "rtn-w5g48"])
def test_what_no_model_class_knows_is_carried(recipe: str, model: Path, tmp_path: Path) -> None:
    """A processor, and heads that a trainer put beside the model's own."""
    heads = {"value_head.weight": torch.randn(1, 64), "v_head.summary.bias": torch.arange(3)}
    save_file(load_file(model / WEIGHTS) | heads, model / WEIGHTS, {"format": "pt"})
    before = set(load_file(model / WEIGHTS))
    (model / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (model / "processor_config.json").write_text('{"processor_class": "X"}')
    list(compress(model, Recipe.parse(recipe, ["dtype=keep"]), tmp_path / "out"))
    files = {file.name for file in model.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files | {"report.json"}
    for file in files - {"config.json", WEIGHTS}:
        assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()
    written = load_file(tmp_path / "out" / WEIGHTS)
    layers = {name for name in before if name.endswith("_proj.weight")}
    assert {name for name in written if "_proj." not in name} == before - layers
    for name, tensor in heads.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)


def change(model: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: t.clone() for name, t in load_file(model / WEIGHTS).items()}
    how(tensors)
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


def test_what_is_stored_in_another_type_than_the_rest_keeps_it(model: Path, tmp_path: Path) -> None:
    norm = "model.norm.weight"

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name != norm:
                tensors[name] = tensors[name].bfloat16()

    change(model, halve)
    kept = load_file(model / WEIGHTS)[norm]
    list(compress(model, "rtn-w4g32", tmp_path / "out"))
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(written[norm], kept)
    assert written[norm].dtype == torch.float32
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_values_that_the_chosen_type_cannot_hold_are_named(model: Path, tmp_path: Path) -> None:
    change(model, lambda t: t["model.norm.weight"].view(-1).__setitem__(0, 7e4))
    plan(model, "rtn-w4g32", tmp_path / "out")
    with pytest.raises(SourceError, match=r"`model.norm.weight` reaches 7e\+04, more than float16"):
        plan(model, Recipe.parse("rtn-w4g32", ["dtype=float16"]), tmp_path / "out")


def test_the_same_bytes_at_another_time_continue_and_others_do_not(model: Path, tmp_path: Path) -> None:
    first = plan(model, "rtn-w4g32", tmp_path / "out").fingerprint["source"]
    (model / WEIGHTS).touch()
    assert plan(model, "rtn-w4g32", tmp_path / "out").fingerprint["source"] == first
    (model / "generation_config.json").write_text('{"max_length": 7}')
    assert plan(model, "rtn-w4g32", tmp_path / "out").fingerprint["source"] != first


@pytest.mark.parametrize("recipe", ["rtn-w4g32", "rtn-w4g32 ends"])
def test_a_shared_table_stored_under_its_other_name(recipe: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(built("gpt2"), tmp_path / "model"))
    table = "transformer.wte.weight"
    assert table in load_file(model / WEIGHTS)
    changes = ["embeddings=w8"] if recipe.endswith("ends") else []
    parsed = Recipe.parse(recipe.split()[0], changes)
    list(compress(model, parsed, tmp_path / "usual"))
    change(model, lambda t: t.update({"lm_head.weight": t.pop(table)}))
    list(compress(model, parsed, tmp_path / "out"))
    ids = torch.arange(8)[None]
    expected = hfquant.load(tmp_path / "usual")(ids).logits
    assert torch.equal(hfquant.load(tmp_path / "out")(ids).logits, expected)


def test_a_kill_between_the_last_moves_and_the_report_can_start_afresh(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = compress(model, "rtn-w4g32", out)
    todo = plan(model, "rtn-w4g32", out)
    for _ in work:
        pass
    (out / "report.json").unlink()
    names = [f.name for f in out.iterdir()]
    todo.journal.begin(todo.fingerprint)
    todo.journal.move(names)
    list(compress(model, "rtn-w8", out, fresh=True))
    assert json.loads((out / "report.json").read_text())["recipe"]["grid"]["bits"] == 8
