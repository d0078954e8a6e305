"""What a budget is worth: bits chosen layer by layer beside one grid everywhere, at equal size, on held-out text.

    python benchmarks/budget.py MODEL --text HELD_OUT.txt --name stories260k [--groups 64 --groups 128]

Measures uniform recipes, `--budgets` averages from 2.4 to 6.5 bits (2.5, 3, 3.5 and 4.25 among them), and as many
bounds on the loss, and writes benchmarks/results/budget_<name>.json and .md.  With `--only` a part alone is measured
anew, into the file that is there: `promises`; `looking`, the time of the look and of the plain recipe, w4 in groups of
64; or `fits`, what is chosen for the files' sizes of the uniform recipes, embeddings and head among it.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget_report import AVERAGES, as_recipe, correlations, gains, markdown, read, uniform_grids, write
from torch import Tensor

from hfquant.budget import Case, Decision, decide, open_case, table_of
from hfquant.budget.candidates import ENDS
from hfquant.budget.promise import reach
from hfquant.compress import compress, plan
from hfquant.errors import QualityError
from hfquant.machine import hardware, versions
from hfquant.measure.evaluate import compare
from hfquant.measure.text import cut, read_text
from hfquant.measure.verify import verify
from hfquant.model.source import open_source
from hfquant.model.stream import stream_logits
from hfquant.plugin import load

GROUPS = (32, 64, 128)
BOUNDS = (0.002, 0.3)  # of the loss
PLAIN = "w4g64sym"


def everywhere(grid: Any) -> dict[str, Any]:
    """The recipe of one grid for all layers, stored as budgets are."""
    return {"name": "everywhere", "steps": [{"method": "gptq"}], "grid": grid, "format": "native"}


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.calibration: dict[str, Any] = {"samples": options.samples, "seq_len": options.seq_len}
        if options.calibration:
            self.calibration["calibration"] = options.calibration
        source = open_source(options.model)
        self.windows: Tensor = cut(read_text(options.text), source.tokenizer(), options.seq_len, options.windows)
        self.source = source
        self.settings = {
            name: value for name, value in vars(options).items() if name not in ("promises", "promise_text", "keep")
        }
        self.keep = Path(options.keep or work / "kept.json")

    def case(self, goal: dict[str, float], out: Path) -> Case:
        recipe = {"name": "gptq", "budget": goal | {"groups": self.options.groups}}
        return open_case(self.options.model, recipe, out, **self.calibration)

    def measured(self, out: Path) -> dict[str, float]:
        """On the held-out text."""
        model = load(out)
        scores = compare(stream_logits(self.source, self.windows, dtype=model.dtype), model, self.windows)
        assert scores.reference_perplexity is not None
        assert scores.kl is not None
        grown = scores.perplexity / scores.reference_perplexity - 1
        return {"perplexity": scores.perplexity, "growth": grown, "kl": scores.kl, "error": scores.growth_error or 0.0}

    def made(self, recipe: Any) -> tuple[dict[str, float], int, float]:
        """(scores, bytes of the weights, processor seconds) of a recipe."""
        out = self.work / "made"
        shutil.rmtree(out, ignore_errors=True)
        began = time.process_time()
        for _ in compress(plan(self.options.model, recipe, out, **self.calibration)):
            pass
        seconds = time.process_time() - began
        return self.measured(out), (out / "model.safetensors").stat().st_size, seconds

    def uniform(self, case: Case) -> list[dict[str, Any]]:
        """One grid everywhere, stored as budgets are."""
        found = []
        for name in self.options.uniform or uniform_grids(self.options.groups):
            scores, nbytes, seconds = self.made(everywhere(as_recipe(name)))
            bits = self.bits_of(case, name)
            found.append({"name": name, "bits": bits, "bytes": nbytes, "seconds": seconds, **scores})
            print(
                f"uniform {name}: {bits:.3f} bits, KL {scores['kl']:.4f}, perplexity +{scores['growth']:.2%}",
                flush=True,
            )
        return found

    def bits_of(self, case: Case, name: str) -> float:
        """Stored bits per weight of one grid everywhere."""
        rows = [
            (next(o for o in row.options if o.name == name), row.weights)
            for row in case.table.rows
            if row.kind not in ENDS
        ]
        return 8 * sum(o.data for o, _ in rows) / sum(weights for _, weights in rows)

    def looking(self, case: Case) -> dict[str, float]:
        """Processor seconds of the look, and of the plain recipe."""
        spent = float(table_of(case).about["processor_seconds"])
        return {"analysis_seconds": spent, "plain_seconds": self.made(everywhere(as_recipe(PLAIN)))[2]}

    def budgets(self, case: Case, count: int) -> list[dict[str, Any]]:
        """Averages of bits, predicted and measured."""
        averages = sorted({*AVERAGES, *np.linspace(2.4, 6.5, count - len(AVERAGES)).round(2).tolist()})
        found, known = [], self.known()
        for average in averages:
            decision = self.decided(case, average)
            row = {"asked": average, "bits": decision.bits, "expected": decision.nbytes, "predicted": decision.loss}
            if average in known:  # an earlier run with the same settings was interrupted
                row |= known[average]
            else:
                scores, nbytes, seconds = self.made(decision.recipe)
                row |= {"bytes": nbytes, "seconds": seconds, **scores}
            found.append(row)
            print(
                f"average {average}: predicted {row['predicted']:.4f}, KL {row['kl']:.4f},"
                f" perplexity +{row['growth']:.2%}",
                flush=True,
            )
            self.keep.write_text(json.dumps({"settings": self.settings, "budgets": found}))
        return found

    def fits(self, uniform: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What is chosen for the size of each of these, with embeddings and head, which they leave as they are."""
        look = self.case({"average_bits": 4}, self.work / "case")
        sizes = {name: nbytes for name, nbytes, _ in self.decided(look, 4).uniform}
        for row in (row for row in uniform if row["name"].endswith("sym")):
            room = row.get("bytes") or sizes[row["name"]]
            case = self.case({"fit": room}, self.work / "fits")
            decision = decide(table_of(case), case.recipe)
            scores, nbytes, _ = self.made(decision.recipe)
            told = {"as": row["name"], "fit": room, "bytes": nbytes, "bits": decision.bits, "predicted": decision.loss}
            told |= {r.kind: option.name for r, option in decision.chosen if r.kind in ENDS} | scores
            yield told | {"uniform_kl": row["kl"], "less": 1 - scores["kl"] / row["kl"]}

    def known(self) -> dict[float, dict[str, Any]]:
        """What an interrupted run with these settings has measured."""
        kept = json.loads(self.keep.read_text()) if self.keep.is_file() else {}
        same = kept.get("settings") == self.settings
        return {row["asked"]: row for row in kept["budgets"]} if same else {}

    def decided(self, case: Case, average: float) -> Decision:
        assert case.recipe.budget is not None
        budget = case.recipe.budget.model_copy(update={"average_bits": average})
        return decide(table_of(case), case.recipe.model_copy(update={"budget": budget}))

    def promises(self, count: int) -> Iterator[dict[str, Any]]:
        """Bounds on the loss, each with as many attempts as it takes; then measured on the held-out text."""
        kept = self.work / "table.json"
        for bound in np.geomspace(*BOUNDS, count).tolist():
            out = self.work / "promise"
            shutil.rmtree(out, ignore_errors=True)
            case = self.case({"max_loss": bound}, out)
            if kept.is_file():  # one look at the model does for all
                case.folder.mkdir(parents=True)
                shutil.copyfile(kept, case.folder / "table.json")
            table = table_of(case)
            shutil.copyfile(case.folder / "table.json", kept)

            def done(recipe: Any, again: bool, out: Path = out) -> None:
                for _ in compress(plan(self.options.model, recipe, out, **self.calibration, fresh=again)):
                    pass
                verify(out, text=self.options.promise_text, windows=self.options.windows, enforce=False)

            try:
                report, kept_it = reach(case, table, done), True
            except QualityError:
                report, kept_it = json.loads((out / "report.json").read_text()), False
            scores = self.measured(out)
            told = report["budget"]
            row = {"allowed": bound, "attempts": told["attempts"], "predicted": told["predicted"]["perplexity_growth"],
                   "measured": told["measured"]["perplexity_growth"],
                   "at_most": told["measured"]["perplexity_growth_at_most"], "bytes": told["measured"]["bytes"],
                   "held_out": scores["growth"], "held_out_error": scores["error"],
                   "kept": kept_it and scores["growth"] <= bound}  # fmt: skip
            print(
                f"at most +{bound:.2%}: {told['attempts']} attempts, +{row['measured']:.2%},"
                f" held out +{row['held_out']:.2%}",
                flush=True,
            )
            yield row


def choices(bench: Bench, case: Case, done: dict[str, Any]) -> None:
    """What is chosen for averages of bits, beside one grid everywhere."""
    done["budgets"] = bench.budgets(case, bench.options.budgets)
    done["uniform"] = bench.uniform(case)
    done |= {"gains": gains(done["uniform"], done["budgets"]), **correlations(done["budgets"])}


def grow(done: dict[str, Any], part: str, about: str, run: dict[str, Any], rows: Iterator[dict[str, Any]]) -> None:
    """Row by row, written after each; what was there before stays until all are."""
    found: list[dict[str, Any]] = []
    done.pop(f"{part}_so_far", None)  # of a run that was interrupted
    for row in rows:
        found.append(row)
        write(done | {f"{part}_so_far": found})
    done[about], done[part] = run, found
    write(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--calibration", help="text, else the packaged one")
    parser.add_argument("--name", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument(
        "--groups", type=int, action="append", help="sizes to choose from, else 32, 64 and 128; a model whose weights"
        " were rounded before, as in a GGUF file, would lose nothing at the groups of that file"
    )  # fmt: skip
    parser.add_argument(
        "--uniform", action="append", help="one grid everywhere, such as w4g64sym, else those around 2.5 to 4.25 bits"
    )
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--keep", help="a file from which an interrupted run goes on")
    parser.add_argument("--promises", type=int, default=20)
    parser.add_argument("--promise-text", help="`compress --text` where a loss is bounded, else the packaged one")
    parser.add_argument("--only", choices=("promises", "looking", "fits"))
    options = parser.parse_args()
    options.groups = options.groups or list(GROUPS)
    torch.manual_seed(0)
    named = {"model": Path(options.model).name, "text": Path(options.text).name}
    for text in ("calibration", "promise_text"):
        named[text] = Path(given).name if (given := getattr(options, text)) else "packaged"
    settings = {name: value for name, value in vars(options).items() if name not in ("keep", "only")} | named
    run = {"settings": settings, "hardware": hardware(), "versions": versions(), "threads": torch.get_num_threads()}
    done: dict[str, Any] = read(options.name) if options.only else run | {"promises": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        if options.only in (None, "looking"):
            case = bench.case({"average_bits": 4}, Path(folder) / "case")
            if options.only is None:
                choices(bench, case, done)
            done["looking"] = run | bench.looking(case)
            write(done)
        if options.only in (None, "fits"):
            grow(done, "fits", "fitted", run, bench.fits(done["uniform"]))
        if options.only in (None, "promises") and options.promises:
            grow(done, "promises", "promised", run, bench.promises(options.promises))
    print(markdown(done))


if __name__ == "__main__":
    main()
