import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfquant.errors import CheckpointError
from hfquant.tensors.shards import DTYPES, INDEX, Entry, ShardWriter, write_checkpoint, write_shard


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def of_every_type() -> dict[str, Tensor]:
    """Two tensors of each type the format knows, in an order that is not that of the file."""
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        bits = torch.arange(24 + i, dtype=torch.int64).to(torch.uint8) % 2
        tensors[f"b.{i}.été"] = bits.to(dtype, copy=True)
        tensors[f"a.{i}"] = bits[:24].reshape(2, 3, 4).to(dtype, copy=True)
    return tensors


def test_same_bytes_as_the_safetensors_library(tmp_path: Path) -> None:
    tensors = of_every_type() | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_shard(tmp_path / "ours", [entry(*item) for item in tensors.items()])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_order_of_arrival_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = of_every_type()
    entries = [entry(*item) for item in tensors.items()]
    write_shard(tmp_path / "forward", entries)
    write_shard(tmp_path / "backward", entries[::-1])
    assert (tmp_path / "forward").read_bytes() == (tmp_path / "backward").read_bytes()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "f", [entry("t", matrix.t()), entry("row", matrix[2])])
    with safe_open(tmp_path / "f", "pt") as f:
        assert torch.equal(f.get_tensor("t"), matrix.t())
        assert torch.equal(f.get_tensor("row"), matrix[2])
        assert f.metadata() == {"format": "pt"}


def test_one_tensor_exists_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def make() -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        tensor = torch.ones(3)
        made.append(weakref.ref(tensor))
        return tensor

    write_shard(tmp_path / "f", [Entry(f"t{i}", (3,), torch.float32, make) for i in range(4)])
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2,), torch.float32), ((3,), torch.float16)], ids=["other shape", "other type"]
)
def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=r"was to hold .* as `w`"):
        write_shard(tmp_path / "f", [Entry("w", shape, dtype, lambda: torch.zeros(3))])
    assert list(tmp_path.iterdir()) == []


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="once"):
        write_shard(tmp_path / "f", [entry("w", torch.zeros(3)), entry("w", torch.zeros(3))])
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_file_never_gets_its_name(tmp_path: Path) -> None:
    announced = {"a": ((1,), torch.float32), "b": ((1,), torch.float32)}
    with (
        pytest.raises(CheckpointError, match="lacks 1 tensors, the first is `b`"),
        ShardWriter(tmp_path / "f", announced) as w,
    ):
        w.put("a", torch.ones(1))
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")

    def crash() -> Tensor:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "f", [entry("a", torch.ones(1)), Entry("b", (1,), torch.float32, crash)])
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


def test_a_small_checkpoint_is_one_file(tmp_path: Path) -> None:
    files = write_checkpoint(tmp_path, [entry("a", torch.ones(4))])
    assert files == [tmp_path / "model.safetensors"]
    assert sorted(tmp_path.iterdir()) == files


def test_a_large_checkpoint_is_sharded_as_transformers_expects(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.zeros(100)}
    files = write_checkpoint(tmp_path, [entry(*item) for item in tensors.items()], max_shard_size=100)
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + [INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 600
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as f:
            assert torch.equal(f.get_tensor(name), tensors[name])


def test_same_layout_as_the_hub_library(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"layers.{i}.w": torch.zeros(3 + i % 5, 4) for i in range(20)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=150)
    write_checkpoint(tmp_path, [entry(*item) for item in tensors.items()], max_shard_size=150)
    ours = json.loads((tmp_path / INDEX).read_text())
    assert ours["weight_map"] == theirs.tensor_to_filename
    assert ours["metadata"]["total_size"] == theirs.metadata["total_size"]
