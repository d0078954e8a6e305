"""Perplexity of recipes on one model, each compressed, reloaded from disk and scored in the same run.

    python benchmarks/quality.py MODEL --calibration CAL.txt --text TEST.txt --recipes gptq-w4g64 rtn-w4g64 ...

A recipe may carry changes behind a comma: `gptq-w4g64,gptq.refine=0`.  Writes JSON and a markdown table.
Settings that are not on the command line: calibration 64 x 512 tokens, seed 0; the first 64 windows of 512 tokens of
the text; scored in float32.  Either text may be a `.npy` file of token ids, see `tokens.py`.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from reporting import write

from hfquant.machine import hardware, versions
from hfquant.measure.evaluate import perplexity
from hfquant.measure.text import cut, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--text")
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-len", type=int, default=512)
    parser.add_argument("--out", type=Path, help="without ending; .json and .md are added")
    args = parser.parse_args()
    windows = tokens(args)
    rows = [{"recipe": "original", "perplexity": score(args.model, windows, original=True)}]
    print(rows[0], flush=True)
    for name in args.recipes:
        rows.append(measure(args, name, windows))
        print({k: v for k, v in rows[-1].items()}, flush=True)
        if args.out:
            record(args, rows)


def tokens(args: argparse.Namespace) -> torch.Tensor:
    if args.text and args.text.endswith(".npy"):
        ids = torch.from_numpy(np.load(args.text))[: args.windows * args.window_len]
        return ids.reshape(args.windows, args.window_len)
    from transformers import AutoTokenizer

    text = read_text(args.text) if args.text else read_text()
    return cut(text, AutoTokenizer.from_pretrained(args.model), args.window_len, args.windows)


def measure(args: argparse.Namespace, name: str, windows: torch.Tensor) -> dict:
    recipe, *changes = name.split(",")
    folder = Path(tempfile.mkdtemp(prefix="quality-"))
    try:
        start = time.perf_counter()
        peak, used = in_child(args, recipe, changes, folder / "out")
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in (folder / "out").glob("*.safetensors"))
        report = json.loads((folder / "out" / "report.json").read_text())
        return {
            "recipe": name,
            "format": report["wire"]["format"],
            "perplexity": score(folder / "out", windows),
            "seconds": round(seconds, 1),
            "compress_seconds": round(report["compression"]["seconds"], 1),
            "processor_seconds": round(used, 1),
            "peak_memory_MB": round(peak / 1e6),
            "MB": round(size / 1e6, 1),
        }
    finally:
        shutil.rmtree(folder)


def in_child(args: argparse.Namespace, recipe: str, changes: list[str], out: Path) -> tuple[int, float]:
    """Compress in a process of its own, as a user would; returns its peak memory in bytes, and the seconds that all its
    threads used together, without those of starting: on a machine that does other work too, compare these."""
    code = (
        "import sys, json, time; from hfquant.recipe import Recipe; from hfquant.compress import compress\n"
        "a, used = json.loads(sys.argv[1]), time.process_time()\n"
        "for _ in compress(a['model'], Recipe.parse(a['recipe'], a['changes']), a['out'], calibration=a['calibration'],"
        " samples=a['samples'], seq_len=a['seq_len']): pass\n"
        "from hfquant.machine import peak_memory; print(peak_memory(), time.process_time() - used)"
    )
    given = vars(args) | {"recipe": recipe, "changes": changes, "out": str(out)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)], check=True, stdout=subprocess.PIPE, text=True
    )
    peak, used = done.stdout.split()[-2:]
    return int(peak), float(used)


def score(folder: str | Path, windows: torch.Tensor, original: bool = False) -> float:
    import transformers

    import hfquant

    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    load = kind.from_pretrained if original else hfquant.load
    return round(perplexity(load(str(folder), dtype=torch.float32), windows).perplexity, 3)


def record(args: argparse.Namespace, rows: list[dict]) -> None:
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "recipes", "model", "calibration", "text")}
    settings |= {"model": Path(args.model).name, "calibration": Path(args.calibration).name}
    settings |= {
        "text": Path(args.text).name if args.text else "packaged",
        "hardware": hardware(),
        "versions": versions(),
    }
    columns = ["recipe", "format", "perplexity", "compress_seconds", "processor_seconds", "peak_memory_MB", "MB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]
    lines += ["", f"{settings['model']}; calibration {settings['calibration']}, {args.samples} x {args.seq_len} tokens;"
              f" scored on {settings['text']}, first {args.windows} windows of {args.window_len}, float32;"
              f" {settings['hardware']['processor']}, {settings['hardware']['cores']} cores."]  # fmt: skip
    write(args.out, {"settings": settings, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
