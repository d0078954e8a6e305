"""What a model loses on each kind of text, by the text that it was calibrated on.

    python benchmarks/calibration_texts.py MODEL --recipe gptq-w3g64 --calibration default --calibration NOVEL.txt \
        --text c4=C4.txt --text code=CODE.txt --work FOLDER --out RESULT

One compression for each --calibration, kept in FOLDER; perplexity of each on every --text: float32, exp of the mean of
all tokens of the first --windows windows.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from reporting import write
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hfquant
from hfquant.compress import compress
from hfquant.machine import hardware, versions
from hfquant.measure.evaluate import perplexity
from hfquant.measure.text import cut, read_text


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = options()
    texts = dict(text.split("=", 1) for text in args.text)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {name: cut(read_text(file), tokenizer, args.seq_len, args.windows) for name, file in texts.items()}

    def row(name: str, model: PreTrainedModel) -> dict[str, Any]:
        found = {"calibration": name} | {text: round(perplexity(model, w).perplexity, 3) for text, w in windows.items()}
        print(found, flush=True)
        return found

    rows = [row("the original", AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))]
    for source in args.calibration:
        told = f"{args.model} {args.recipe} {source} {args.samples} {args.seq_len}"
        out = args.work / hashlib.sha256(told.encode()).hexdigest()[:16]
        if not (out / "report.json").is_file():
            for _ in compress(
                args.model, args.recipe, out, calibration=source, samples=args.samples, seq_len=args.seq_len
            ):
                pass
        rows.append(row(Path(source).name, hfquant.load(out, dtype=torch.float32)))
    settings = {
        "model": Path(args.model).name,
        "recipe": args.recipe,
        "calibration": f"{args.samples} x {args.seq_len} tokens",
        "texts": {name: Path(file).name for name, file in texts.items()},
        "windows": f"first {args.windows} of {args.seq_len} tokens, float32",
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }
    write(args.out, {"settings": settings, "rows": rows}, table(settings, rows, list(texts)))


def table(settings: dict[str, Any], rows: list[dict[str, Any]], texts: list[str]) -> str:
    lines = [
        f"# What a model is calibrated on: {settings['recipe']}, {settings['model']}",
        "",
        f"Perplexity, {settings['windows']}; {settings['calibration']} of each calibration text.",
        "",
        f"| calibrated on | {' | '.join(texts)} |",
        f"|---|{'---:|' * len(texts)}",
        *(f"| {row['calibration']} | {' | '.join(f'{row[text]:.2f}' for text in texts)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
