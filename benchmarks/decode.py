"""Decode speed of compressed models against the bfloat16 original, at batch 1 on this machine's CPU.

    python benchmarks/decode.py MODEL [MODEL ...] [--quick]

Every variant (2..8 bits, groups of 64, 128 and whole rows, symmetric and not) is rounded to nearest in memory.
The original and the variant then decode the same tokens in turns, several rounds of each in one process; the
ratio is the median over the rounds of compressed time / original time, so that whatever else the machine does
hits both.  "cpu" is the processor time of the process, "wall" the clock.  Embeddings stay bfloat16, and so does the
head but in the rows that say "head 8": there it runs in 8 bits, as `hfquant.use_head` offers it.

A row's "step" says where the processor time of a token goes: in the compressed layers and the head, each called again
with the inputs it had, and in all that the model does around them, per block.

Writes results/decode.json and results/decode.md next to this file.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from reporting import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfquant import use_head
from hfquant.machine import hardware, versions
from hfquant.runtime import cache
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

RESULTS = Path(__file__).parent / "results"


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers a recipe compresses by default: all but the head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def compress(layer: nn.Linear, grid: Grid) -> QLinear:
    W = layer.weight.detach().float()
    scale, zero = grid.fit(W)
    Q = Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)
    return QLinear.from_quantized(Q, layer.bias, formats.load("native"), layer.weight.dtype)


def install(model: PreTrainedModel, layers: dict[str, nn.Linear] | dict[str, QLinear], head: nn.Module) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.set_output_embeddings(head)


def rounded(model: PreTrainedModel, bits: int | None) -> nn.Module:
    """The head in so many bits, beside the one that is there."""
    kept = model.get_output_embeddings()
    if bits is None:
        return kept
    model.set_output_embeddings(copy.copy(kept))
    reason = use_head(model, bits)
    if reason is not None:
        raise SystemExit(f"the head cannot run in {bits} bits: {reason}")
    made = model.get_output_embeddings()
    model.set_output_embeddings(kept)
    return made


@torch.no_grad()
def step(model: PreTrainedModel, ids: Tensor, blocks: int) -> dict[str, float]:
    """Processor seconds of a token behind the prompt `ids`, and of its compressed layers and head alone."""
    prompt, token, read = ids[:, :-1], ids[:, -1:], []
    head, layers = model.get_output_embeddings(), [m for m in model.modules() if isinstance(m, QLinear)]

    def once() -> None:
        past = model(prompt, use_cache=True).past_key_values
        began = time.process_time()
        model(token, past_key_values=past, use_cache=True)
        seconds.append(time.process_time() - began)

    seconds: list[float] = []
    for _ in range(8):
        once()
    hooks = [m.register_forward_pre_hook(lambda m, args: read.append((m, args[0]))) for m in (*layers, head)]
    whole = min(seconds)
    past = model(prompt, use_cache=True).past_key_values
    read.clear()
    model(token, past_key_values=past, use_cache=True)
    for hook in hooks:
        hook.remove()
    inside = _least([(m, x) for m, x in read if m is not head])
    last = _least([(m, x) for m, x in read if m is head])
    return {"whole": whole, "layers": inside, "head": last, "rest_per_block": (whole - inside - last) / blocks}


def _least(calls: list[tuple[nn.Module, Tensor]]) -> float:
    """The least processor seconds that these calls took, one after the other."""
    found = []
    for _ in range(30):
        began = time.process_time()
        for module, x in calls:
            module(x)
        found.append(time.process_time() - began)
    return min(found)


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: Tensor, following: Tensor) -> dict[str, float]:
    """Seconds for the prompt and, per token, for feeding `following` one by one (the tokens are given, so
    that every variant does the same work)."""
    start = _clocks()
    cached = model(prompt, use_cache=True).past_key_values
    middle = _clocks()
    for token in following.split(1, 1):
        cached = model(token, past_key_values=cached, use_cache=True).past_key_values
    end, tokens = _clocks(), following.shape[1]
    return {
        "cpu": (end[0] - middle[0]) / tokens,
        "wall": (end[1] - middle[1]) / tokens,
        "prompt_cpu": middle[0] - start[0],
    }


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def compare(
    model: PreTrainedModel,
    original: dict[str, nn.Linear],
    variant: tuple[Grid, int | None],
    run: Callable[[], dict[str, float]],
    rounds: int,
    ids: Tensor,
) -> dict[str, Any]:
    """One row of the table: a variant against the original, in turns.  variant: grid, and bits of the head"""
    grid, bits = variant
    compressed = {name: compress(layer, grid) for name, layer in original.items()}
    kept, head = model.get_output_embeddings(), rounded(model, bits)
    timings: dict[str, list[dict[str, float]]] = {"original": [], "compressed": []}
    for turn in range(rounds + 1):  # the first turn warms up: packs are made, pages touched
        for key, layers, last in (("original", original, kept), ("compressed", compressed, head)):
            install(model, layers, last)
            timing = run()
            if turn:
                timings[key].append(timing)
    row: dict[str, Any] = {"grid": str(grid), "bits": grid.bits, "group_size": grid.group_size, "head": bits}
    row["step"] = step(model, ids, model.config.num_hidden_layers)
    row["symmetric"], row["blocks"] = grid.symmetric, model.config.num_hidden_layers
    for clock in ("cpu", "wall", "prompt_cpu"):
        before = [t[clock] for t in timings["original"]]
        after = [t[clock] for t in timings["compressed"]]
        row[f"{clock}_ratio"] = statistics.median(b / a for a, b in zip(before, after, strict=True))
        row[f"{clock}_seconds"] = {"original": before, "compressed": after}
    row["tokens_per_second"] = {k: 1 / min(t["wall"] for t in timings[k]) for k in timings}
    row["bytes"] = {
        "original": sum(layer.weight.nbytes for layer in original.values()),
        "packed": sum(part.nbytes for layer in compressed.values() for part in layer.parts),
        "kernel": cache.size(),
    }
    install(model, original, kept)
    cache.forget([kept.weight])
    return row


def variants(quick: bool) -> Iterator[tuple[Grid, int | None]]:
    for bits, group_size, symmetric in product(range(2, 9), (64, 128, -1), (True, False)):
        if not quick or (group_size == 64 and symmetric) or bits == 4:
            yield Grid(bits, group_size, symmetric), None
            if group_size == 64 and symmetric and bits in (2, 4, 8):
                yield Grid(bits, group_size, symmetric), 8


def table(document: dict[str, Any]) -> str:
    settings, machine = document["settings"], document["hardware"]
    lines = [
        "# Decode at batch 1: compressed / bfloat16 (below 1 is faster)",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {settings['instructions']}, load {settings['load']:.1f} "
        f"at the start; {settings['threads']} thread(s), torch {document['versions']['torch']}, "
        f"transformers {document['versions']['transformers']}.  Prompt {settings['prompt']} tokens, "
        f"{settings['tokens']} decoded, median of {settings['rounds']} interleaved rounds.  "
        "Ratios are of processor time unless it says wall.  Tokens/s are of the best round, by the wall clock: "
        "compare them within a row only, they move with whatever else the machine does.",
    ]
    for model in document["models"]:
        lines += ["", f"## {model['model']}", ""]
        lines += ["| grid | ratio | wall ratio | tokens/s | original | prompt ratio | MB packed + kernel (bf16) "]
        lines[-1] += "| ms of a token: layers + head + blocks x rest |"
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in model["rows"]:
            speed, size = row["tokens_per_second"], {k: v / 1e6 for k, v in row["bytes"].items()}
            spent, blocks = row["step"], row["blocks"]
            name = row["grid"] + (f", head {row['head']}" if row["head"] else "")
            lines.append(
                f"| {name} | {row['cpu_ratio']:.2f} | {row['wall_ratio']:.2f} "
                f"| {speed['compressed']:.1f} | {speed['original']:.1f} | {row['prompt_cpu_ratio']:.2f} "
                f"| {size['packed']:.0f} + {size['kernel']:.0f} ({size['original']:.0f}) "
                f"| {spent['layers'] * 1e3:.1f} + {spent['head'] * 1e3:.1f} "
                f"+ {blocks} x {spent['rest_per_block'] * 1e3:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="every width at group 64, everything at 4 bits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="1 is what a busy machine can measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "settings": {k: getattr(args, k) for k in ("threads", "rounds", "tokens", "prompt")}
        | {"batch": 1, "load": os.getloadavg()[0], "instructions": torch.backends.cpu.get_cpu_capability()},
        "models": [],
    }
    for path in args.models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, args.prompt + args.tokens), generator=generator)
        original, rows = linears(model), []
        document["models"].append({"model": Path(path).name, "rows": rows})

        def run(model: PreTrainedModel = model, ids: Tensor = ids) -> dict[str, float]:
            return decode(model, ids[:, : args.prompt], ids[:, args.prompt :])

        for variant in variants(args.quick):
            rows.append(compare(model, original, variant, run, args.rounds, ids[:, : args.prompt + 1]))
            print(f"{Path(path).name} {variant[0]}, head {variant[1]}: {rows[-1]['cpu_ratio']:.2f}", flush=True)
            write(args.out / "decode", document, table(document))


if __name__ == "__main__":
    main()
