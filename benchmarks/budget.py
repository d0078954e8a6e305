"""What a budget is worth: bits chosen layer by layer beside one grid everywhere, at equal size, on held-out text.

    python benchmarks/budget.py MODEL --text HELD_OUT.txt --name stories260k [--groups 64 --groups 128]

Measures uniform recipes, `--budgets` averages from 2.4 to 6.5 bits (2.5, 3, 3.5 and 4.25 among them), and as many
bounds on the loss, and writes benchmarks/results/budget_<name>.json and .md.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
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

RESULTS = Path(__file__).parent / "results"
GROUPS = (32, 64, 128)
AVERAGES = (2.5, 3.0, 3.5, 4.25)
BOUNDS = (0.002, 0.3)  # of the loss


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
        return {"perplexity": scores.perplexity, "growth": grown, "kl": scores.kl}

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
            scores, nbytes, seconds = self.made(
                {"name": name, "steps": [{"method": "gptq"}], "grid": grid_of(name), "format": "native"}
            )
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

    def budgets(self, case: Case, count: int) -> tuple[list[dict[str, Any]], float]:
        """Averages of bits, predicted and measured; and the seconds that the analysis took."""
        table = table_of(case)
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
        return found, float(table.about["processor_seconds"])

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
                   "measured": told["measured"]["perplexity_growth"], "bytes": told["measured"]["bytes"],
                   "held_out": scores["growth"], "kept": kept_it and scores["growth"] <= bound}  # fmt: skip
            print(
                f"at most +{bound:.2%}: {told['attempts']} attempts, +{row['measured']:.2%},"
                f" held out +{row['held_out']:.2%}",
                flush=True,
            )
            yield row


def uniform_grids(groups: Sequence[int]) -> list[str]:
    """What a user would pick from: the widths around AVERAGES with the two smallest groups, with and without a zero
    point, and one wider."""
    few = sorted(groups)[:2]
    names = [f"w{bits}g{group}{kind}" for bits in (2, 3, 4) for group in reversed(few) for kind in ("sym", "")]
    return [*names, f"w5g{few[-1]}sym"]


def grid_of(name: str) -> dict[str, Any]:
    """Of the name that a table gives a grid."""
    bits, group = name.removesuffix("sym").removeprefix("w").split("g")
    return {"bits": int(bits), "group_size": int(group), "symmetric": name.endswith("sym")}


def gains(uniform: list[dict[str, Any]], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each of AVERAGES: the loss beside that of the uniform recipes at the same number of bits.

    Between two of them their losses' logarithms are interpolated (`uniform`), which is the line that finer and finer
    steps of bits would follow, and their losses (`blind`): what a mixture of both has whose layers are picked blindly.
    """
    best: list[dict[str, Any]] = []
    for row in sorted(uniform, key=lambda row: row["bits"]):
        if not best or row["kl"] < best[-1]["kl"]:
            best.append(row)
    found = []
    for average in AVERAGES:
        row = next(row for row in chosen if row["asked"] == average)
        said: dict[str, Any] = {"average": average, "bits": row["bits"]}
        for name in ("kl", "growth"):
            losses = np.array([max(r["kl"] if name == "kl" else math.log1p(r["growth"]), 1e-6) for r in best])
            bits, at = [r["bits"] for r in best], row["bits"]
            beside = {"uniform": math.exp(float(np.interp(at, bits, np.log(losses))))}
            beside["blind"] = float(np.interp(at, bits, losses))
            own = row["kl"] if name == "kl" else math.log1p(row["growth"])
            said[name] = own
            for kind, loss in beside.items():
                said |= {f"{name}_{kind}": loss, f"{name}_{kind}_less": 1 - own / loss}
        found.append(said)
    return found


def markdown(done: dict[str, Any]) -> str:
    lines = [
        f"# Budgets: {done['settings']['name']}", "",
        f"{done['settings']['samples']} sequences of {done['settings']['seq_len']} tokens for calibration"
        f" ({done['settings'].get('calibration', 'packaged')}); held out:"
        f" {done['settings']['windows']} windows of {done['settings']['text']}. Losses are ln(perplexity / original's)"
        " and KL in nats per token; beside them those of one grid everywhere, interpolated at the same bits: of the"
        " logarithm, and (blind) as they are, which layers that are picked blindly from both grids would lose.", "",
        "| average | stored bits | KL | uniform | less | blind | less | ln ppl | uniform | less | blind | less |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in done["gains"]:
        cells = [f"{row['average']:g}", f"{row['bits']:.3f}"]
        for name in ("kl", "growth"):
            cells.append(f"{row[name]:.4f}")
            for kind in ("uniform", "blind"):
                cells += [f"{row[f'{name}_{kind}']:.4f}", f"{row[f'{name}_{kind}_less']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| one grid | stored bits | KL | ln ppl |", "|---|---:|---:|---:|"]
    for row in sorted(done["uniform"], key=lambda row: float(row["bits"])):
        lines.append(f"| {row['name']} | {row['bits']:.3f} | {row['kl']:.4f} | {math.log1p(row['growth']):.4f} |")
    lines += [
        "",
        f"Rank correlation of predicted and measured over {len(done['budgets'])} budgets: KL"
        f" {done['rank_kl']:.3f}, perplexity {done['rank_growth']:.3f}.",
    ]
    if "under" in done:
        lines += [f"Size: {done['under']:.2%} below what was predicted at most, never above."]
    if done["promises"]:
        kept = sum(row["kept"] for row in done["promises"])
        lines += [
            f"`max_loss`, measured by hfquant on {done['settings']['promise_text']}, kept on the held-out text:"
            f" {kept} of {len(done['promises'])}."
        ]
    lines += [
        f"Looking at the model took {done['analysis_seconds']:.1f} s of processor time, the plain recipe"
        f" {done['plain_seconds']:.1f} s: {done['analysis_seconds'] / done['plain_seconds']:.0%} more.", "",
    ]  # fmt: skip
    return "\n".join(lines)


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
    options = parser.parse_args()
    options.groups = options.groups or list(GROUPS)
    torch.manual_seed(0)
    named = {"model": Path(options.model).name, "text": Path(options.text).name}
    for text in ("calibration", "promise_text"):
        named[text] = Path(given).name if (given := getattr(options, text)) else "packaged"
    settings = {name: value for name, value in vars(options).items() if name != "keep"} | named
    done: dict[str, Any] = {"settings": settings, "hardware": hardware(), "versions": versions()}
    done |= {"threads": torch.get_num_threads(), "promises": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        case = bench.case({"average_bits": 4}, Path(folder) / "case")
        budgets, seconds = bench.budgets(case, options.budgets)
        uniform = bench.uniform(case)
        done |= {"budgets": budgets, "uniform": uniform, "gains": gains(uniform, budgets), **correlations(budgets)}
        done["analysis_seconds"] = seconds
        done["plain_seconds"] = next(row["seconds"] for row in uniform if row["name"].startswith("w4"))
        write(done)
        for row in bench.promises(options.promises) if options.promises else ():
            done["promises"].append(row)
            write(done)
    print(markdown(done))


def correlations(budgets: list[dict[str, Any]]) -> dict[str, float]:
    """How well losses were foretold, and sizes."""
    predicted = [row["predicted"] for row in budgets]
    sized = [row for row in budgets if "bytes" in row]
    over = [row for row in sized if row["bytes"] > row["expected"]]
    if over:
        raise SystemExit(f"over the budget: {over}")
    return {
        "rank_kl": float(spearmanr(predicted, [row["kl"] for row in budgets])[0]),
        "rank_growth": float(spearmanr(predicted, [row["growth"] for row in budgets])[0]),
        **({"under": max(1 - row["bytes"] / row["expected"] for row in sized)} if sized else {}),
    }


def write(done: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    name = done["settings"]["name"]
    (RESULTS / f"budget_{name}.json").write_text(json.dumps(done, indent=1) + "\n")
    (RESULTS / f"budget_{name}.md").write_text(markdown(done))


if __name__ == "__main__":
    main()
