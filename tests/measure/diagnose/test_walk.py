"""What is seen block by block is what is there in the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hfquant
from hfquant.compress import compress
from hfquant.measure.diagnose.walk import Seen, frequent, matrices, walk
from hfquant.runtime.offload.opening import open_model
from tests import families

IDS = torch.randint(4, 200, (6, 24), generator=torch.Generator().manual_seed(0))
Built = Callable[[str], Path]


def seen(folder: Path, tmp_path: Path, ids: Tensor = IDS) -> Seen:
    return walk(open_model(folder, torch.float32), ids, tmp_path / "states", batch=4)


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What modules of a whole model read."""
    found: dict[str, Tensor] = {}
    for name in names:

        def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1])

        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(IDS)
    return found


def test_inputs_and_ends_are_those_of_the_whole_model(built: Built, tmp_path: Path) -> None:
    found = seen(built("llama"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(built("llama")).eval()
    names = [f"model.layers.{row['block']}.{row['roles'][0]}" for row in found.inputs]
    assert len(names) == 3 * 4, "q, k, v share theirs, and so do gate and up"
    read = inputs_of(model, [*names, "lm_head"])
    for row, name in zip(found.inputs, names, strict=True):
        size = read[name].abs()
        assert row["tokens"]["max"] == pytest.approx(float(size.max()), rel=1e-4)
        assert row["tokens"]["min"] == pytest.approx(float(size.amax(1).min()), rel=1e-4)
        channel = size.amax(0)
        assert row["channel_ratio"] == pytest.approx(float(channel.max() / channel.median()), rel=1e-4)
    ids = frequent(IDS)
    torch.testing.assert_close(found.tables["embeddings"], model.get_input_embeddings()(ids).detach())
    first = read["lm_head"][: len(found.tables["hidden"])]
    torch.testing.assert_close(found.tables["hidden"], first, rtol=1e-4, atol=1e-4)


def test_smoothing_takes_what_outliers_there_are(built: Built, tmp_path: Path) -> None:
    """A channel that is fifty times the others, as large models have, is far smaller after equation 4."""
    folder = tmp_path / "outlier"
    model = AutoModelForCausalLM.from_pretrained(built("llama"))
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] *= 50
    model.save_pretrained(folder)
    rows = [row for row in seen(folder, tmp_path).inputs if "self_attn.q_proj" in row["roles"]]
    for row in rows:
        assert row["channel_ratio"] > 25
        assert row["channel_ratio_smoothed"] < row["channel_ratio"] / 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "neox"])
def test_every_matrix_of_every_block_is_seen(family: str, built: Built, tmp_path: Path) -> None:
    if family not in families.FAMILIES:
        family = next(name for name in families.FAMILIES if "neox" in name)
    found = seen(built(family), tmp_path)
    names = {f"{row['stack']}.{row['block']}.{row['role']}" for row in found.weights}
    assert names == families.linears(family)
    outputs = {row["role"] for row in found.weights if row["attention_output"]}
    assert len(outputs) >= 1
    assert all(role.rpartition(".")[2] in ("o", "o_proj", "c_proj", "dense", "out_proj") for role in outputs)
    assert all(row["tokens"]["max"] > 0 for row in found.inputs)


def test_a_compressed_model_is_seen_as_it_runs(built: Built, tmp_path: Path) -> None:
    for _ in compress(built("llama"), "rtn-w2g32", tmp_path / "small"):
        pass
    found, dense = seen(tmp_path / "small", tmp_path), seen(built("llama"), tmp_path)
    model = hfquant.load(tmp_path / "small", dtype=torch.float32).eval()
    read = inputs_of(model, ["lm_head", "model.layers.2.mlp.down_proj"])
    row = next(row for row in found.inputs if row["block"] == 2 and row["roles"] == ["mlp.down_proj"])
    assert row["tokens"]["max"] == pytest.approx(float(read["model.layers.2.mlp.down_proj"].abs().max()), rel=1e-3)
    first = read["lm_head"][: len(found.tables["hidden"])]
    torch.testing.assert_close(found.tables["hidden"], first, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found.tables["hidden"], dense.tables["hidden"], rtol=1e-2)
    block, packed = model.model.layers[0], dict(matrices(model.model.layers[0]))
    expected = hfquant.dequantize(model).model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(packed["mlp.up_proj"], expected.float())
    assert len(packed) == 7, block
