"""What a card tells its reader to type works, on the very folder that it lies in."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfquant.conversion.export import export
from hfquant.measure import card

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Made = Callable[..., Path]


def typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the first Python lines of a card leave behind, typed in its folder.

    The second are for who has no hfquant, but the packages that the card names: `tests/witness` types those.
    """
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(compile(BLOCK.findall((folder / card.FILE).read_text("utf-8"))[0], card.FILE, "exec"), found)
    return found


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "native", "dense"])
def test_the_lines_load_the_model(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    folder = made("rtn-w4g32")
    if to != "compressed-tensors":  # which it is already
        export(folder, to, tmp_path / "out")
        folder = tmp_path / "out"
    text = (folder / card.FILE).read_text("utf-8")
    if to == "dense":
        assert "`AutoModelForCausalLM.from_pretrained` of transformers reads it" in text
        assert not BLOCK.findall(text)
        return
    left = typed(folder, monkeypatch)
    ids = left["tokenizer"]("The lion", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert left["model"](ids).logits.isfinite().all()
    assert ("without hfquant;" in text or "and without hfquant." in text) == (to != "native")


@pytest.mark.filterwarnings("ignore")  # of the exporter's
def test_the_lines_run_the_graph(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="an extra: hfquant[onnx]")
    export(made("rtn-w4g32"), "onnx", tmp_path / "out")
    left = typed(tmp_path / "out", monkeypatch)
    assert left["logits"].shape[:2] == left["inputs"]["input_ids"].shape
