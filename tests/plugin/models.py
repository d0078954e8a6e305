"""Small random models for the plugin's tests, and the ways they are loaded and compared."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfquant.model.texts import packaged
from hfquant.plugin import HfQuantConfig
from hfquant.runtime.experts import QExperts
from hfquant.runtime.nn import Packed
from tests.families import FAMILIES, byte_tokenizer, inputs

MATRIX = ("llama", "llama-tied", "gpt2", "opt", "t5", "flan-t5", "bart", "mixtral", "qwen3_moe")
TEXT = packaged("evaluation")[:4000]
TOKENS = torch.tensor(byte_tokenizer()(TEXT, verbose=False)["input_ids"])
IDS = TOKENS[:24].view(2, 12)

GRIDS = {"compressed_tensors": "w4g32sym", "gptq": "w3g32asym", "native": "w5g48asym"}  # what each can store


def request(format: str = "auto", grid: str = "w4g32", **more: Any) -> HfQuantConfig:
    """Rounding on load, into a format."""
    return HfQuantConfig({"steps": [{"method": "rtn"}], "grid": grid, "format": format} | more)


def load_with_transformers(family: str, folder: Path, **kwargs: Any) -> PreTrainedModel:
    auto = getattr(transformers, FAMILIES[family].auto)
    return auto.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What the model says about a fixed text, float32."""
    return model(**inputs(model, IDS)).logits.float()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def packed(model: nn.Module) -> set[str]:
    """Names of the modules that hold packed weights."""
    return {name for name, module in model.named_modules() if isinstance(module, (Packed, QExperts))}


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def quantization_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return found
