"""Decode speed of what recipes write to disk, against the bfloat16 original, at batch 1 on this machine's CPU.

    python benchmarks/decode_recipes.py MODEL [MODEL ...] [--experts] [--recipes rtn-w8a8 ...]

`decode.py` has every width of rounded weights; here are 8-bit inputs, sparse weights, low-rank corrections, GPT-2's
transposed layers (give such a model) and experts (`--experts`: a Mixtral with random weights, hidden 768, 8 experts of
1536, 4 blocks).  Each recipe's checkpoint is written with a calibration of 4 x 64 random tokens, loaded again, and
decodes in turns with the original.  Writes results/decode_recipes.json and .md.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import RESULTS, decode
from reporting import write
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import hfquant
from hfquant.compress import compress
from hfquant.machine import hardware, versions

RECIPES = (
    "rtn-w4g64", "rtn-w8a8", "zeroquant-w4a8g64", "smoothquant-w8a8", "sparsegpt-2of4-w4g64", "sparsegpt-50+gptq-w4g64",
    "sparsegpt-50", "lorc-w3g64",
)  # fmt: skip
PROMPT, TOKENS = 32, 16


def ratios(original: PreTrainedModel, other: PreTrainedModel, rounds: int) -> dict[str, Any]:
    """The median over rounds of other / original."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, original.config.vocab_size, (1, PROMPT + TOKENS), generator=generator)
    timings: list[list[dict[str, float]]] = [[], []]
    for turn in range(rounds + 1):  # the first turn warms up
        for model, found in zip((original, other), timings, strict=True):
            timing = decode(model, ids[:, :PROMPT], ids[:, PROMPT:])
            if turn:
                found.append(timing)
    return {
        f"{clock}_ratio": statistics.median(b[clock] / a[clock] for a, b in zip(*timings, strict=True))
        for clock in ("cpu", "wall", "prompt_cpu")
    }


def one(source: Path, original: PreTrainedModel, recipe: str, rounds: int) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp(prefix="decode-"))
    try:
        tokens = np.random.default_rng(0).integers(4, original.config.vocab_size, 4 * 64)
        np.save(work / "tokens.npy", tokens)
        for _ in compress(source, recipe, work / "out", calibration=str(work / "tokens.npy"), samples=4, seq_len=64):
            pass
        size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
        model = hfquant.load(work / "out", dtype=torch.bfloat16).eval()
        return {"recipe": recipe, "MB": round(size / 1e6, 1)} | ratios(original, model, rounds)
    finally:
        shutil.rmtree(work)


def experts(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=12,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "threads": 1, "batch": 1, "prompt": PROMPT, "tokens": TOKENS, "rounds": args.rounds,
        "load": os.getloadavg()[0], "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        sources = [*args.models, *([experts(Path(temporary) / "random-mixtral-8x")] if args.experts else [])]
        for source in sources:
            original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
            rows = found[source.name] = []
            for recipe in args.recipes:
                rows.append(one(source, original, recipe, args.rounds))
                print(source.name, rows[-1], flush=True)
                document = {"hardware": hardware(), "versions": versions(), "settings": settings, "models": found}
                write(RESULTS / "decode_recipes", document, table(found, settings))


def table(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> str:
    lines = [
        "# Decode at batch 1 of what recipes write: compressed / bfloat16 (below 1 is faster)",
        "",
        f"{hardware()['processor']}, {settings['instructions']}, {settings['threads']} thread; prompt {PROMPT} tokens, "
        f"{TOKENS} decoded, median of {settings['rounds']} interleaved rounds, of processor time.",
    ]  # fmt: skip
    for name, rows in found.items():
        lines += ["", f"## {name}", "", "| recipe | decode | prompt | MB |", "|---|---:|---:|---:|"]
        lines += [f"| {r['recipe']} | {r['cpu_ratio']:.2f} | {r['prompt_cpu_ratio']:.2f} | {r['MB']} |" for r in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
