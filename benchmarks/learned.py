"""Recipes beside each other: the same model, calibration tokens and test windows as in rivals.py, one after the other.

    python benchmarks/learned.py MODEL --calibration CAL.txt --text TEST.txt --work FOLDER --out RESULT \
        --recipe gptq-w4g64 --recipe gptq-w4g64+lkd --recipe gptq-w4g64+lkd:lkd.steps=80

A recipe's changes stand behind it, as after `--set`; `calibration.source=random` (or `self`, or another text) takes the
place of CAL.txt.  Checkpoints and rows are kept in FOLDER: a run that was
interrupted goes on where it was, and its row says how many blocks were finished before (`resumed`); its seconds are
those of all parts, its processor seconds those of the last.  Every recipe is run in a process of its own.  Perplexity:
float32, exp of the mean over all tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import write
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfquant
from hfquant.compress import compress
from hfquant.machine import hardware, peak_memory, versions
from hfquant.measure.evaluate import perplexity
from hfquant.measure.text import cut, read_text
from hfquant.recipe import Recipe


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def kept(name: str) -> str:
    """What the checkpoint of a recipe is called."""
    return "--".join(part.replace("/", "_") for part in name.split(":"))


def one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One recipe: compressed, loaded, measured."""
    recipe, *changes = name.split(":")
    out = args.work / kept(name)
    begun = time.process_time()
    given: dict[str, Any] = {"samples": args.samples, "seq_len": args.seq_len}
    if not any(change.startswith("calibration.source=") for change in changes):
        given["calibration"] = args.calibration
    for _ in compress(args.model, Recipe.parse(recipe, changes), out, **given):
        pass
    used = time.process_time() - begun
    report = json.loads((out / "report.json").read_text())
    windows = cut(read_text(args.text), AutoTokenizer.from_pretrained(args.model), args.seq_len, args.windows)
    done = report["compression"]
    lessons = [site for site in done.get("sites", []) if site["step"] == "lkd"]
    return {
        "recipe": name,
        "perplexity": perplexity(hfquant.load(out, dtype=torch.float32), windows).perplexity,
        "seconds": round(done["seconds"], 1),
        "processor_seconds": round(used, 1),
        "resumed": done["resumed"],
        "peak_MB": round(peak_memory() / 1e6),
        "MB": round(report["output"]["bytes"] / 1e6, 1),
        "blocks": [[round(site["error_before"], 4), round(site["error"], 4), site["best_step"]] for site in lessons],
    }


def _short(change: str) -> str:
    key, _, value = change.partition("=")
    return f"{key}={Path(value).name}"


def main() -> None:
    args = options()
    if "HFQUANT_LEARNED" in os.environ:
        name = os.environ["HFQUANT_LEARNED"]
        row = one(name, args)
        row["recipe"] = ":".join(part if "=" not in part else _short(part) for part in name.split(":"))
        (args.work / f"{kept(name)}.json").write_text(json.dumps(row))
        return
    windows = cut(read_text(args.text), AutoTokenizer.from_pretrained(args.model), args.seq_len, args.windows)
    load = partial(AutoModelForCausalLM.from_pretrained, args.model, dtype=torch.float32)
    settings = {
        "model": Path(args.model).name,
        "calibration": f"{Path(args.calibration).name}, {args.samples} x {args.seq_len} tokens",
        "text": f"{Path(args.text).name}, first {args.windows} windows of {args.seq_len}, float32",
        "original": perplexity(load(), windows).perplexity,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }
    rows = []
    for name in args.recipe:
        row = args.work / f"{kept(name)}.json"
        if not row.is_file():
            environment = os.environ | {"HFQUANT_LEARNED": name}
            subprocess.run([sys.executable, *sys.argv], check=True, env=environment)
        rows.append(json.loads(row.read_text()))
        print(rows[-1], flush=True)
        write(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
