"""The pictures that argue for QuantGPT: embeddings of teacher, plain training and QuantGPT, and what each clips.

    python benchmarks/quantgpt_figures.py TEACHER --text TEXT --work FOLDER --out PICTURES [--epochs 4]

Both students are trained at 2-2-8 from the same teacher on the same text: "plain" learns the text's next tokens with
PACT's clipping, as quantization-aware training has been done; "QuantGPT" has the options' defaults.  In PICTURES are
`embeddings.png`, of all three in one plane, for each student the folder that `hfquant diagnose` writes (with
`clipping.png`), and `embeddings.json`: the mean cosine of all pairs of embeddings.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from reporting import write

from hfquant.machine import hardware, versions
from hfquant.measure.diagnose import diagnose, opened_skeleton
from hfquant.measure.diagnose.embeddings import compared
from hfquant.measure.diagnose.walk import walk
from hfquant.measure.figures import draw
from hfquant.model.calibration import token_batches
from hfquant.train import plan, train

SAMPLES, WINDOW = 8, 128
STUDENTS: dict[str, dict[str, Any]] = {
    "plain": {"quantizer": "pact", "logits": 0.0, "contrast": 0.0, "truth": 1.0},
    "QuantGPT": {},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser.parse_args()


def student(name: str, args: argparse.Namespace) -> Path:
    """Trained, if it is not there already."""
    out: Path = args.work / name
    if not (out / "report.json").is_file():
        settings = {"epochs": args.epochs, "seq_len": WINDOW, "lr": args.lr, "scale_lr": args.lr}
        step = {"method": "quantgpt", **settings, **STUDENTS[name]}
        train(plan(args.teacher, {"steps": [step], "grid": "w2"}, args.text, out))
    return out


def main() -> None:
    args = options()
    models = {"original": args.teacher, **{name: student(name, args) for name in STUDENTS}}
    tables = {}
    for name, folder in models.items():
        with (
            opened_skeleton(folder, torch.float32) as skeleton,
            tempfile.TemporaryDirectory() as states,
        ):
            size: dict[str, Any] = {"samples": SAMPLES, "seq_len": WINDOW, "seed": 0}
            tokens = token_batches(args.text, skeleton.source.tokenizer(), **size)
            tables[name] = walk(skeleton, tokens, Path(states)).tables
        if name != "original":
            diagnose(folder, args.out / name, against=args.teacher, text=args.text, dtype=torch.float32, **size)
    found = compared(tables)
    draw({"embeddings": found, "layers": ()}, args.out)
    rows = [{key: row[key] for key in ("kind", "model", "cosine")} for row in found]
    settings = {
        "text": Path(args.text).name, "epochs": args.epochs, "lr": args.lr, "window": WINDOW, "samples": SAMPLES,
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    write(args.out / "embeddings.json", {"settings": settings, "rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
