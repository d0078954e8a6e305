"""Unpacking GGUF files: the tensors that transformers makes of them, in bounded memory, or a refusal."""

import hashlib
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from hfquant.errors import CheckpointError, ResourceError, SourceError
from hfquant.model import gguf as staging
from hfquant.model.gguf import stage
from hfquant.model.gguf_tensors import Parameters

from .gguf_files import BF16, F16, FAMILIES, Q4_1, Q8_0, bpe_vocabulary, write_gguf

LLAMA = FAMILIES["llama"]


def by_transformers(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    return model


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_same_model_as_transformers_makes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    file = write_gguf(tmp_path / "model.gguf", FAMILIES[name])
    theirs = by_transformers(file, dtype)
    ours, info = AutoModelForCausalLM.from_pretrained(
        stage(file, tmp_path / "out", dtype), dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    expected, got = theirs.state_dict(), ours.state_dict()
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype == dtype, key
        assert torch.equal(got[key], tensor), key
    ids = torch.arange(8)[None]
    with torch.no_grad():
        # equal weights; where they lie in memory decides the last bits of a product
        torch.testing.assert_close(ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", [Q8_0, Q4_1, F16, BF16], ids=lambda kind: kind.name)
def test_every_piece_size_gives_the_same_values(tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA, kinds=(kind,))
    whole = digests(stage(file, tmp_path / "whole"))
    monkeypatch.setattr("hfquant.model.gguf_tensors.PIECE", 3 * 64)  # three rows, so that the last piece is ragged
    assert digests(stage(file, tmp_path / "pieces")) == whole


def test_experts_are_stored_one_by_one_as_in_any_checkpoint(tmp_path: Path) -> None:
    out = stage(write_gguf(tmp_path / "model.gguf", FAMILIES["qwen3moe"]), tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as f:
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in f.keys()  # noqa: SIM118
        assert not any(name.endswith("experts.gate_up_proj") for name in f.keys())  # noqa: SIM118


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA, extra=bpe_vocabulary())
    ours = AutoTokenizer.from_pretrained(stage(file, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert ours("hello, he said").input_ids == theirs("hello, he said").input_ids
    assert ours.decode(ours("hello").input_ids, skip_special_tokens=True) == "hello"


def test_one_parameter_exists_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    find = staging.parameters

    def watched(*args: object) -> Parameters:
        found = find(*args)  # type: ignore[arg-type]

        def load(name: str) -> Tensor:
            alive.append(sum(ref() is not None for ref in made))
            tensor = found.load(name)
            made.append(weakref.ref(tensor))
            return tensor

        return Parameters(found.names, load)

    monkeypatch.setattr(staging, "parameters", watched)
    stage(write_gguf(tmp_path / "model.gguf", FAMILIES["qwen3moe"]), tmp_path / "out")
    assert len(alive) > 10
    assert set(alive) == {0}


def test_the_same_file_is_unpacked_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA)
    out = stage(file, tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    assert stage(file, tmp_path / "out") == out
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == before


def test_another_file_or_type_replaces_the_folder(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA)
    first = digests(stage(file, tmp_path / "out"))
    second = digests(stage(file, tmp_path / "out", torch.float16))
    write_gguf(file, LLAMA, seed=1)
    third = digests(stage(file, tmp_path / "out", torch.float16))
    assert len({d["model.safetensors"] for d in (first, second, third)}) == 3


def test_same_bytes_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA)
    whole = digests(stage(file, tmp_path / "whole"))
    leftover = tmp_path / "out.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors.tmp").write_text("half a file")
    assert digests(stage(file, tmp_path / "out")) == whole
    assert not leftover.exists()


def test_a_folder_that_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty, and not an unpacked GGUF"):
        stage(file, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("left", [0, 3, 20, 300, 3000, -40], ids=str)
def test_a_truncated_file_is_refused(tmp_path: Path, left: int) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(SourceError, match=r"truncated or damaged|not a GGUF file") as caught:
        stage(file, tmp_path / "out")
    assert "download it again" in str(caught.value.hint)
    assert [f.name for f in tmp_path.iterdir()] == ["model.gguf"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent\.gguf does not exist"):
        stage(tmp_path / "absent.gguf", tmp_path / "out")


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", replace(LLAMA, arch="megatron9"))
    with pytest.raises(SourceError, match="architecture `megatron9`") as caught:
        stage(file, tmp_path / "out")
    assert "llama" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_named_rather_than_made_up(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA, drop="blk.1.ffn_up.weight")
    with pytest.raises(SourceError, match=r"1 parameters, `model\.layers\.1\.mlp\.up_proj\.weight`"):
        stage(file, tmp_path / "out")


def test_shapes_that_the_config_does_not_mean_are_refused(tmp_path: Path) -> None:
    wide = replace(FAMILIES["qwen3moe"], block=FAMILIES["qwen3moe"].block | {"ffn_down_exps.weight": (4, 64, 96)})
    with pytest.raises(SourceError, match=r"`model\.layers\.0\.mlp\.experts\.down_proj` as \[4, 64, 96\]"):
        stage(write_gguf(tmp_path / "model.gguf", wide), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model.gguf"]


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", LLAMA, extra={"split.count": 3})
    with pytest.raises(SourceError, match="one of 3 parts"):
        stage(file, tmp_path / "out")


def test_a_full_disk_is_noticed_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ResourceError, match="the disk of"):
        stage(write_gguf(tmp_path / "model.gguf", LLAMA), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model.gguf"]
