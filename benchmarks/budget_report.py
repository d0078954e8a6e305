"""What budget.py compares with, and what it writes of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"
AVERAGES = (2.5, 3.0, 3.5, 4.25)


def uniform_grids(groups: Sequence[int]) -> list[str]:
    """What a user would pick from: the widths around AVERAGES with the two smallest groups, with and without a zero
    point, and one wider."""
    few = sorted(groups)[:2]
    names = [f"w{bits}g{group}{kind}" for bits in (2, 3, 4) for group in reversed(few) for kind in ("sym", "")]
    return [*names, f"w5g{few[-1]}sym"]


def as_recipe(name: str) -> str:
    """How a recipe says the grid that a table has under this name: there, one without a word is symmetric."""
    return name if name.endswith("sym") else f"{name}asym"


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
    if "rank_kl" in done:
        lines += [
            "",
            f"Rank correlation of predicted and measured over {len(done['budgets'])} budgets: KL"
            f" {done['rank_kl']:.3f}, perplexity {done['rank_growth']:.3f}.",
        ]
    if "under" in done:
        lines += [f"Size: {done['under']:.2%} below what was predicted at most, never above."]
    lines += fitted(done.get("fits", []))
    if done["promises"]:
        kept = sum(row["kept"] for row in done["promises"])
        text = done["promised"]["settings"]["promise_text"]
        lines += [
            f"`max_loss`, measured by hfquant on {text}, kept on the held-out text: {kept} of {len(done['promises'])}."
        ]
    if look := done.get("looking"):
        lines += [
            f"Looking at the model took {look['analysis_seconds']:.1f} s of processor time, the plain recipe"
            f" {look['plain_seconds']:.1f} s ({look['settings']['samples']} sequences):"
            f" {look['analysis_seconds'] / look['plain_seconds']:.0%} more."
        ]
    return "\n".join([*lines, ""])


def fitted(rows: list[dict[str, Any]]) -> list[str]:
    """What was chosen for the sizes of uniform recipes."""
    if not rows:
        return []
    lines = [
        "", "At the size of its files, embeddings and head chosen for, which one grid everywhere leaves alone:", "",
        "| size of | bytes at most | bytes | bits in blocks | embeddings | head | KL | one grid | less |",
        "|---|---:|---:|---:|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        ends = [row.get(kind, "tied") for kind in ("embedding", "head")]
        sizes = [f"{row['fit']:,}", f"{row['bytes']:,}", f"{row['bits']:.3f}"]
        cells = [row["as"], *sizes, *ends, f"{row['kl']:.4f}", f"{row['uniform_kl']:.4f}", f"{row['less']:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


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


def read(name: str) -> dict[str, Any]:
    """What an earlier run has written."""
    found: dict[str, Any] = json.loads((RESULTS / f"budget_{name}.json").read_text())
    return found


def write(done: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    name = done["settings"]["name"]
    (RESULTS / f"budget_{name}.json").write_text(json.dumps(done, indent=1) + "\n")
    (RESULTS / f"budget_{name}.md").write_text(markdown(done))
