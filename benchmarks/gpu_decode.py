"""A whole model on a device, token by token, against itself in bfloat16: one CUDA graph per token where it can."""

import time
from typing import Any

import torch
from decode import compress, install, linears
from transformers import AutoModelForCausalLM

from hfquant.runtime.decode import Decoder
from hfquant.tensors.grid import Grid


def whole_model(path: str, grids: list[Grid], device: str, prompt: int = 32, tokens: int = 64) -> list[dict[str, Any]]:
    """A line for bfloat16 and for each grid: seconds of a token (the least of three runs), and whether a graph ran."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().to(device)
    original, head = linears(model), model.get_output_embeddings()
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    lines: list[dict[str, Any]] = []
    for grid in (None, *grids):
        layers = original if grid is None else {n: compress(m.cpu(), grid).to(device) for n, m in original.items()}
        install(model, layers, head)
        decoder = Decoder(model, 1, prompt + tokens)
        decoder.generate(ids, 2)
        seconds = min(_seconds(decoder, ids, tokens) for _ in range(3))
        lines.append(
            {"grid": "bf16" if grid is None else str(grid), "seconds": seconds, "eager": decoder.eager_because}
        )
        lines[-1]["ratio_to_bf16"] = lines[0]["seconds"] / seconds
        if grid is None:
            for layer in original.values():
                layer.cpu()  # the packed ones take its place
    return lines


def _seconds(decoder: Decoder, ids: torch.Tensor, tokens: int) -> float:
    decoder.prompt(ids)
    _wait(ids.device)
    began = time.perf_counter()
    for _ in range(tokens):
        decoder.step()
    _wait(ids.device)
    return (time.perf_counter() - began) / tokens


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
