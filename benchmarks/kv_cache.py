"""Perplexity with a compressed KV cache, with queries in 8 bit, and with attention to the heaviest tokens only.

    python benchmarks/kv_cache.py MODEL --text TEST.txt [--out benchmarks/results/kv_cache_NAME]

Windows are read 64 tokens at a time, every piece attending to the cache of those before it: all but the newest 64 to
127 tokens are seen as they were rounded, as in generation.  Rounded queries and sparse attention are measured on the
last tokens of each window, one at a time, as they apply to new tokens only.  Scored in float32.  Rows that OUT has
already, with the same settings, are kept.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from hfquant import CompressedCache, use_kv_cache
from hfquant.machine import hardware, versions
from hfquant.measure.text import cut, read_text
from hfquant.runtime.topk import use_topk
from hfquant.tensors.encoding import KVCache

PIECE = 64


@torch.inference_mode()
def loss(model: Any, windows: torch.Tensor, cache: Callable[[], Any], steps: int) -> tuple[float, int]:
    """Mean negative log-likelihood, and bytes of a full cache.  steps: score these last tokens one by one, 0: all."""
    total, count, nbytes = 0.0, 0, 0
    for window in windows:
        past, ids = cache(), window.unsqueeze(0)
        cuts = list(range(0, ids.shape[1] - steps, PIECE)) + list(range(ids.shape[1] - steps, ids.shape[1]))
        for start, end in zip(cuts, [*cuts[1:], ids.shape[1]], strict=True):
            logits = model(ids[:, start:end], past_key_values=past).logits[0]
            if steps and end - start > 1:
                continue
            targets = ids[0, start + 1 : end + 1]
            total += float(torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="sum"))
            count += len(targets)
        nbytes = sum(layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
                     for layer in past.layers)  # fmt: skip
    return total / count, nbytes


def kept(out: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run of the same measured."""
    file = out.with_suffix(".json") if out is not None else None
    if file is None or not file.is_file():
        return []
    before = json.loads(file.read_text())
    rows: list[dict[str, Any]] = before["rows"] if before["settings"] == settings else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = read_text(given.text) if given.text else read_text()
    windows = cut(text, tokenizer, given.window_len, given.windows)
    config = model.config
    settings = {
        "model": Path(given.model).name, "text": text.name, "windows": len(windows), "window_len": given.window_len,
        "piece": PIECE, "steps": given.steps, "window": 64, "group": 64, "dtype": "float32",
    }  # fmt: skip

    rows = kept(given.out, settings)

    def add(
        name: str, cache: Callable[[], Any], steps: int = 0, share: float = 1.0, how: KVCache | None = None
    ) -> None:
        if any((row["cache"], row["steps"], row["attention"]) == (name, steps, share) for row in rows):
            return
        use_topk(model, share)
        use_kv_cache(model, how)
        nll, nbytes = loss(model, windows, cache, steps)
        base = next((row for row in rows if row["steps"] == steps), None)
        rows.append({"cache": name, "attention": share, "steps": steps, "perplexity": math.exp(nll), "bytes": nbytes})
        rows[-1]["cost"] = rows[-1]["perplexity"] / (base or rows[-1])["perplexity"] - 1
        print(rows[-1], flush=True)
        if given.out:  # what there is, as the whole takes long
            result = {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": rows}
            write(given.out, result, table(result))

    add("full", lambda: DynamicCache(config=config))
    for bits in (8, 4, 2):
        add(f"{bits} bit", lambda bits=bits: CompressedCache(config, bits))
    add("4 bit, groups of 32", lambda: CompressedCache(config, 4, group=32))
    add("full", lambda: DynamicCache(config=config), given.steps)
    for how in (KVCache(8), KVCache(8, queries=8), KVCache(4), KVCache(4, queries=8)):
        name = f"{how.bits} bit" + (", queries in 8" if how.queries else "")
        add(name, lambda: DynamicCache(config=config), given.steps, how=how)
    for share in (0.5, 0.2, 0.1, 0.05):
        add("full", lambda: DynamicCache(config=config), given.steps, share)
    add("4 bit", lambda: CompressedCache(config, 4), given.steps, 0.1)


def table(result: dict[str, Any]) -> str:
    s = result["settings"]
    lines = [
        f"{s['model']}, {s['text']}, {s['windows']} windows of {s['window_len']} tokens, read {s['piece']} at a time "
        f"(all tokens scored), or the last {s['steps']} one by one; window 64, groups of 64, float32.",
        "",
        "| cache | tokens a new one attends to | scored | perplexity | cost | cache, MB |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        scored = f"last {r['steps']}" if r["steps"] else "all"
        lines.append(
            f"| {r['cache']} | {r['attention']:.0%} | {scored} | {r['perplexity']:.3f} | {r['cost']:+.2%} | "
            f"{r['bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
