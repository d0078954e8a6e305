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
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    done = subprocess.run(
        [str(program), *map(str, words)], capture_output=True, text=True, env=env, cwd=HERE, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def made(source: Path, folder: Path, recipe: str, *changes: str) -> Path:
    for _ in compress(source, Recipe.parse(recipe, list(changes)), folder):
        pass
    return folder


def stock_logits(program: Path, folder: Path, work: Path) -> tuple[torch.Tensor, str]:
    """What stock transformers makes of a checkpoint, and which class its layers have."""
    assert (folder / "README.md").is_file()
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


def test_dense_in_stock_transformers(tmp_path: Path) -> None:
    program = environment.python("compressed_tensors", TORCH, (*STOCK, "compressed-tensors>=0.15"))
    source = families.build("llama", tmp_path / "source")
    made(source, tmp_path / "first", "rtn-w3g32", "format=native", "dtype=float32")
    export(tmp_path / "first", "dense", tmp_path / "out")
    found, kind = stock_logits(program, tmp_path / "out", tmp_path)
    assert kind == "Linear"
    torch.testing.assert_close(found, our_logits(tmp_path / "first"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["rtn-w4g32sym", "rtn-w3g32asym"])
def test_onnx_in_onnxruntime(recipe: str, tmp_path: Path) -> None:
    """Neither torch nor transformers is there."""
    program = environment.python("onnxruntime", ("onnxruntime>=1.22", "numpy>=2"))
    source = families.build("llama", tmp_path / "source")
    made(source, tmp_path / "first", recipe, "dtype=float32", "format=native")
    export(tmp_path / "first", "onnx", tmp_path / "out")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    run(program, HERE / "onnx_graph.py", tmp_path / "out" / "model.onnx", tmp_path / "ids.npy", tmp_path / "logits.npy")
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, our_logits(tmp_path / "first"), rtol=1e-4, atol=1e-4)


def in_llama_cpp(folder: Path, work: Path) -> tuple[list[float], list[float]]:
    """Log-probabilities of the tokens of a text, by llama.cpp from an exported model and by us from the checkpoint."""
    program = environment.python("llama_cpp", ("--only-binary=:all:", "xllamacpp==2026.10.11549"))
    text = packaged("evaluation")[:600]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    every = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = every[:120]
    (work / "text.txt").write_text(text)
    (work / "ids.json").write_text(json.dumps(ids))
    said = run(program, HERE / "llama_cpp.py", work / "out" / "model.gguf", work / "text.txt", work / "ids.json")
    found = json.loads(said[said.index('{"tokens"') :])
    assert found["tokens"] == every
    model = hfquant.load(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = {int(at): logprob for at, logprob in found["next"].items()}
    assert len(theirs) >= 60
    return list(theirs.values()), [float(scores[at - 1, ids[at]]) for at in theirs]


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "rtn-w4g32sym"), ("llama", "rtn-w8g32sym"), ("gpt2", "rtn-w4g32asym"), ("qwen2", "rtn-w5g32sym")],
)
def test_gguf_in_llama_cpp(family: str, recipe: str, trained: Trained, tmp_path: Path) -> None:
    """The same tokens, the same next-token probabilities but for what its kernels round."""
    folder = made(trained(family), tmp_path / "small", recipe, "dtype=float16")
    cut_words(folder)
    export(folder, "gguf", tmp_path / "out")
    theirs, ours = map(perplexity, in_llama_cpp(folder, tmp_path))
    assert theirs == pytest.approx(ours, rel=0.02)


def wide(folder: Path) -> Path:
    """A random Llama whose rows are as long as the blocks of ggml's K types, 256 weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = families.FAMILIES["llama"].settings | sizes | {"vocab_size": families.VOCABULARY, "bos_token_id": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings, initializer_range=0.05)).save_pretrained(folder)
    families.byte_tokenizer().save_pretrained(folder)
    return folder


def with_offsets_that_are_exact(folder: Path) -> None:
    """Scales rounded to powers of two: another model, whose zero points fit Q4_1."""
    tensors = load_file(folder / "model.safetensors")
    scales = [name for name in tensors if name.endswith("scales")]
    assert scales
    for name in scales:
        tensors[name] = tensors[name].abs().log2().round().exp2()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("rtn-w2g256", "Q2_K"),
        ("rtn-w3sym", "Q3_K"),
        ("rtn-w4g256asym", "Q4_K"),
        ("rtn-w5g256asym", "Q5_K"),
        ("rtn-w6sym", "Q6_K"),
        ("rtn-w4g32asym", "Q4_1"),
    ],
)
def test_types_of_long_blocks_and_with_offsets_in_llama_cpp(recipe: str, kind: str, tmp_path: Path) -> None:
    """Random weights: no text is likely, but every logit is compared, and they are far apart."""
    folder = made(wide(tmp_path / "source"), tmp_path / "small", recipe, "dtype=float16")
    if kind == "Q4_1":
        with_offsets_that_are_exact(folder)
    cut_words(folder)
    done = export(folder, "gguf", tmp_path / "out")
    assert set(done["wire"]["types"].values()) == {kind}
    theirs, ours = in_llama_cpp(folder, tmp_path)
    errors = np.abs(np.subtract(theirs, ours))
    assert np.std(ours) > 0.3
    assert errors.mean() < 0.1 * np.std(ours)
    assert perplexity(theirs) == pytest.approx(perplexity(ours), rel=0.02)
