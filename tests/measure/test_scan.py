import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfquant.errors import CheckpointError
from hfquant.measure.scan import scan

from .models import save, tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = save(tiny(), tmp_path, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Put tensors into the first shard, or take them out."""
    file = min(folder.glob("*.safetensors"))
    content = {**load_file(file), **{name.replace("__", "."): t for name, t in tensors.items()}}
    save_file({name: t.contiguous() for name, t in content.items() if t is not None}, file)
    return file


def index(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_whole_checkpoint_is_counted(sharded: Path) -> None:
    found = scan(sharded)
    assert found["files"] == len(set(index(sharded).values()))
    assert found["tensors"] == len(index(sharded))
    assert found["bytes"] == sum(p.numel() * 4 for p in tiny().parameters())


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    assert scan(save(tiny(), tmp_path))["files"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_number_that_is_none_is_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(3, 1000, dtype=dtype)
    bad[2, 7] = value
    save_file({"a.fine": torch.zeros(4), "b.weight_scale": bad}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`b.weight_scale` in model.safetensors holds .* element 2,007"):
        scan(tmp_path)


def test_tensors_larger_than_a_piece_are_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfquant.measure.scan.PIECE", 16)
    bad = torch.zeros(100)
    bad[99] = math.nan
    save_file({"w": bad}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="element 99 of 100"):
        scan(tmp_path)


def test_eight_bit_floats_are_looked_at(tmp_path: Path) -> None:
    bad = torch.ones(4).to(torch.float8_e4m3fn)
    bad.view(torch.uint8)[1] = 0x7F
    save_file({"w": bad}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`w` .* nan at element 1"):
        scan(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_truncated_shards_are_named(sharded: Path, keep: int) -> None:
    file = max(sharded.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated"):
        scan(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    file = max(sharded.glob("*.safetensors"))
    file.unlink()
    with pytest.raises(CheckpointError, match=f"the shard {file.name} is missing"):
        scan(sharded)


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    name = min(n for n, f in index(sharded).items() if f == min(index(sharded).values()))
    change(sharded, **{name.replace(".", "__"): None, "other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"`{name}` is not in"):
        scan(sharded)


def test_a_tensor_that_no_index_knows(sharded: Path) -> None:
    file = change(sharded, stray=torch.zeros(2))
    with pytest.raises(CheckpointError, match=f"`stray` is in {file.name} but not in the index"):
        scan(sharded)


def test_a_tensor_that_is_there_twice(sharded: Path) -> None:
    name = max(index(sharded))
    change(sharded, **{name.replace(".", "__"): torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"`{name}` is in .* and in "):
        scan(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        scan(sharded)


@pytest.mark.parametrize("name", ["", ".weight", "a..b", "a\nb"])
def test_names_that_no_module_can_have(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the name of a tensor"):
        scan(tmp_path)


def test_empty_tensors_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        scan(tmp_path)
    save_file({"w": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"`w` in model.safetensors is empty: its shape is \[0, 4\]"):
        scan(tmp_path)
