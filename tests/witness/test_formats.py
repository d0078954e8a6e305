"""What was exported, run by the programs it was exported for, with nothing of ours in their process."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hfquant
from hfquant.compress import compress
from hfquant.conversion.export import export
from hfquant.model.texts import packaged
from hfquant.recipe import Recipe
from hfquant.runtime.nn import Packed
from tests import families
from tests.witness import environment
from tests.words import cut_words

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent
IDS = torch.arange(4, 68).view(2, 32)
TORCH = ("torch==2.13.0",)
STOCK = ("transformers==5.23.0", "accelerate", "numpy>=2")
Trained = Callable[[str], Path]


def run(program: Path, *words: str | Path) -> str:
    """A witness's output.  hfquant is not in its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, env=env, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def made(source: Path, folder: Path, recipe: str, *changes: str) -> Path:
    for _ in compress(source, Recipe.parse(recipe, list(changes)), folder):
        pass
    return folder


def stock_logits(program: Path, folder: Path, work: Path) -> tuple[torch.Tensor, str]:
    """What stock transformers makes of a checkpoint, and which class its layers have."""
    np.save(work / "ids.npy", IDS.numpy())
    said = run(program, HERE / "logits.py", folder, work / "ids.npy", work / "logits.npy")
    return torch.from_numpy(np.load(work / "logits.npy")), said.split()[-1]


def our_logits(folder: Path, weights: torch.dtype = torch.float32) -> torch.Tensor:
    """weights: what those that are compressed are rounded to, once decoded."""
    packed = {name for name, module in hfquant.load(folder).named_modules() if isinstance(module, Packed)}
    model = hfquant.load(folder, dtype=torch.float32, dequantize=True).eval()
    for name in packed:
        weight = model.get_submodule(name).weight
        weight.data = weight.data.to(weights).float()
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("recipe", ["rtn-w4g32sym", "rtn-w8sym"])
def test_compressed_tensors_in_stock_transformers(recipe: str, tmp_path: Path) -> None:
    program = environment.python("compressed_tensors", TORCH, (*STOCK, "compressed-tensors>=0.15"))
    source = families.build("llama", tmp_path / "source")
    made(source, tmp_path / "first", recipe, "format=native", "dtype=float32")
    export(tmp_path / "first", "compressed-tensors", tmp_path / "out")
    found, _ = stock_logits(program, tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, our_logits(tmp_path / "first"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["rtn-w4g32sym", "rtn-w4g32asym", "rtn-w3g32asym", "rtn-w8g32sym"])
def test_gptq_in_stock_transformers(recipe: str, tmp_path: Path) -> None:
    program = environment.python("gptq", TORCH, (*STOCK, "optimum==2.3.0"), ("gptqmodel==7.6.0",))
    source = families.build("llama", tmp_path / "source")
    made(source, tmp_path / "first", recipe, "format=native", "dtype=float16")
    export(tmp_path / "first", "gptq", tmp_path / "out")
    found, kind = stock_logits(program, tmp_path / "out", tmp_path)
    assert kind == "TorchLinear", "gptqmodel's, not ours and not a dense one"
    expected = our_logits(tmp_path / "first", torch.float16)  # as gptqmodel decodes them
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "rtn-w4g32sym"), ("llama", "rtn-w8g32sym"), ("gpt2", "rtn-w4g32asym"), ("qwen2", "rtn-w5g32sym")],
)
def test_gguf_in_llama_cpp(family: str, recipe: str, trained: Trained, tmp_path: Path) -> None:
    """The same tokens, the same next-token probabilities but for what its kernels round."""
    program = environment.python("llama_cpp", ("--only-binary=:all:", "xllamacpp==2026.10.11549"))
    folder = made(trained(family), tmp_path / "small", recipe, "dtype=float16")
    cut_words(folder)
    export(folder, "gguf", tmp_path / "out")
    text = packaged("evaluation")[:600]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:120]
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    said = run(
        program, HERE / "llama_cpp.py", tmp_path / "out" / "model.gguf", tmp_path / "text.txt", tmp_path / "ids.json"
    )
    found = json.loads(said[said.index('{"tokens"') :])
    assert found["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    model = hfquant.load(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = {int(at): logprob for at, logprob in found["next"].items()}
    ours = {at: float(scores[at - 1, ids[at]]) for at in theirs}
    ppl = [math.exp(-sum(loss.values()) / len(loss)) for loss in (theirs, ours)]
    assert len(theirs) >= 60
    assert ppl[0] == pytest.approx(ppl[1], rel=0.02), ppl
