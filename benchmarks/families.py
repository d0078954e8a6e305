"""Perplexity of every preset on small models of every family, each trained here for a minute or two.

    python benchmarks/families.py --trained FOLDER [--families gpt2 bart ...] [--recipes rtn-w3 ...] --out RESULT

The models are those of the tests (`tests/families.py`): 64 to 160 features, trained on the packaged text, byte by byte.
FOLDER keeps them.  Calibration: 64 x 64 tokens of the packaged calibration text.  Scored: held-out text, exact kernels;
encoder-decoders restore a masked copy of it.  Small models have no outliers to speak of and little to spare: what this
shows is that every method runs on every architecture and how methods compare, not what it costs a large model.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from reporting import write

import hfquant
from hfquant.compress import compress
from hfquant.errors import HfquantError
from hfquant.machine import hardware, versions
from hfquant.recipe import Recipe
from hfquant.recipe_source import presets
from hfquant.runtime import kernels

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import families

ROUGH = ("rtn-w4", "rtn-w3g64", "gptq-w4", "rtn-w3g32+lorc-r8")  # beside the presets, which are gentle


def score(folder: Path) -> tuple[float, int]:
    model = hfquant.load(str(folder), dtype=torch.float32)
    with kernels.mode("exact"):
        found = families.perplexity(model)
    return found, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def one(source: Path, recipe: str) -> dict[str, Any]:
    """A recipe's row for one family, or why there is none."""
    out = Path(tempfile.mkdtemp(prefix="families-")) / "out"
    try:
        with families.one_thread():
            layers = list(compress(source, recipe, out, samples=64, seq_len=families.WINDOW))
        perplexity, nbytes = score(out)
        worst = max(layer.error or 0.0 for layer in layers)
        return {"perplexity": round(perplexity, 4), "bytes": nbytes, "worst_layer_error": round(worst, 4)}
    except HfquantError as error:
        return {"refused": error.message.replace(str(source), source.name)}
    finally:
        shutil.rmtree(out.parent)


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = list(rows)
    lines = ["| recipe | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for recipe in dict.fromkeys(recipe for row in rows.values() for recipe in row):
        cells = [row.get(recipe, {}) for row in rows.values()]
        lines.append(
            f"| {recipe} | " + " | ".join(f"{c['perplexity']:.3f}" if "perplexity" in c else "—" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(families.FAMILIES))
    parser.add_argument("--recipes", nargs="+", default=[*presets(), *ROUGH])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipes = [recipe for recipe in args.recipes if not Recipe.parse(recipe).trains]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for family in args.families:
        source = args.trained / family
        if not source.is_dir():
            families.train(family, source)
        auto = getattr(transformers, families.FAMILIES[family].auto)
        original = families.perplexity(auto.from_pretrained(source, dtype=torch.float32).eval())
        rows[family] = {"original": {"perplexity": round(original, 4)}}
        for recipe in recipes:
            rows[family][recipe] = one(source, recipe)
            print(family, recipe, rows[family][recipe], flush=True)
        settings = {"calibration": "packaged, 64 x 64 tokens", "text": "packaged, held out, 96 windows of 64, float32",
                    "hardware": hardware(), "versions": versions()}  # fmt: skip
        write(args.out, {"settings": settings, "families": rows}, table(rows))


if __name__ == "__main__":
    main()
