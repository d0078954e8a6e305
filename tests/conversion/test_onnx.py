"""Exports to ONNX: onnxruntime computes what the packed model does, from codes that are still codes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hfquant
from hfquant.compress import compress
from hfquant.conversion.export import export
from hfquant.errors import ExportError
from hfquant.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter's
onnx = pytest.importorskip("onnx", reason="an extra: hfquant[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="an extra: hfquant[onnx]")
pytest.importorskip("onnxscript", reason="an extra: hfquant[onnx]")

IDS = torch.randint(4, 200, (3, 21), generator=torch.Generator().manual_seed(0))
INT8, FLOAT = 3, 1  # of ONNX
Built = Callable[[str], Path]


def exported(folder: Path, recipe: Recipe, model: Path) -> tuple[Any, Any]:
    """The graph, and its logits for IDS."""
    for _ in compress(model, recipe, folder / "small"):
        pass
    done = export(folder / "small", "onnx", folder / "out")
    assert done["wire"]["format"] == "onnx"
    session = onnxruntime.InferenceSession(str(folder / "out" / "model.onnx"))
    mask = np.ones(IDS.shape, np.int64)
    [logits] = session.run(["logits"], {"input_ids": IDS.numpy(), "attention_mask": mask})
    return onnx.load(folder / "out" / "model.onnx", load_external_data=False).graph, torch.from_numpy(logits)


@pytest.mark.parametrize(
    ("family", "recipe", "changes"),
    [
        ("llama-tied", "rtn-w4g48", ("embeddings=w8g32",)),
        ("gpt2", "rtn-w3g32+lorc-r4", ()),
    ],
    ids=["ragged groups, tied table", "low rank, Conv1D"],
)
def test_onnxruntime_computes_the_same(
    family: str, recipe: str, changes: tuple[str, ...], built: Built, tmp_path: Path
) -> None:
    chosen = Recipe.parse(recipe, ["calibration.samples=4", "calibration.seq_len=32", *changes])
    graph, found = exported(tmp_path, chosen, built(family))
    model = hfquant.load(tmp_path / "small", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kinds = Counter(tensor.data_type for tensor in graph.initializer)
    decoded = sum(node.op_type == "DequantizeLinear" for node in graph.node)
    assert decoded >= 12
    assert kinds[INT8] >= 2 * decoded, "codes and zero points are int8 in the file"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "onnxruntime.InferenceSession" in card
    assert "library_name: onnx" in card


def test_what_cannot_be_said_is_refused(built: Built, tmp_path: Path) -> None:
    for family, recipe, problem in (("llama", "rtn-w8a8", "round the inputs"), ("t5", "rtn-w8", "for decoders")):
        for _ in compress(built(family), recipe, tmp_path / family):
            pass
        with pytest.raises(ExportError, match=problem):
            export(tmp_path / family, "onnx", tmp_path / "out")
        assert not (tmp_path / "out").exists()
