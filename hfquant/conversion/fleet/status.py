"""A plan, for people and for programs: lines of a table, JSON, a page of HTML that stands alone."""

import html
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ... import __version__
from ...measure.markdown import code
from ...tensors.shards import write_text
from .reconcile import Plan
from .verdict import Verdict

COLUMNS = ("model", "recipe", "target", "verdict", "why")
MARKS = {"up to date": "✔", "missing": "+", "stale": "↻", "running": "▶", "failed": "✘", "blocked": "■", "foreign": "≠"}


def line(verdict: Verdict) -> list[str]:
    """One pair, as `COLUMNS` says."""
    pair = verdict.wanted
    return [pair.model, pair.recipe, pair.target, verdict.kind, "; ".join(verdict.reasons)]


def document(plan: Plan, now: float | None = None) -> dict[str, Any]:
    """Everything, as JSON."""
    at = time.time() if now is None else now
    return {
        "hfquant": __version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "counts": plan.counts(),
        "due": len(plan.due),
        "usd_at_most": round(plan.usd, 2),
        "pairs": [_pair(verdict) for verdict in plan.verdicts],
    }


def _pair(verdict: Verdict) -> dict[str, Any]:
    pair, made = verdict.wanted, (verdict.result.made if verdict.result else None) or {}
    return {
        "model": pair.model,
        "commit": pair.original.commit if pair.original else None,
        "recipe": pair.recipe,
        "recipe_hash": pair.chosen.hash,
        "target": pair.target,
        "verdict": verdict.kind,
        "reasons": list(verdict.reasons),
        "due": verdict.due,
        "usd_at_most": verdict.usd,
        "job": verdict.job,
        "result_commit": verdict.result.commit if verdict.result else None,
        "metrics": made.get("metrics"),
    }


def page(plan: Plan, endpoint: str, now: float | None = None) -> str:
    """HTML of our own words, with all others escaped; it loads nothing."""
    found = document(plan, now)
    rows = "\n".join(_row(pair, endpoint) for pair in found["pairs"])
    counts = ", ".join(f"{html.escape(kind)}: {n}" for kind, n in found["counts"].items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fleet</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border-bottom: 1px solid #8886; padding: .4rem .6rem; text-align: left; vertical-align: top; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #eee; }} a {{ color: #9cf; }} }}
</style>
</head>
<body>
<h1>Fleet</h1>
<p>{counts or "nothing"}. As of {html.escape(found["at"])}, hfquant {html.escape(found["hfquant"])}.</p>
<table>
<thead><tr><th>model</th><th>recipe</th><th>result</th><th>state</th><th>why</th><th>perplexity</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def _row(pair: dict[str, Any], endpoint: str) -> str:
    there = _link(endpoint, pair["target"]) if pair["result_commit"] else html.escape(pair["target"])
    cells = [
        _link(endpoint, pair["model"]),
        html.escape(pair["recipe"]),
        there,
        f"{MARKS[pair['verdict']]} {html.escape(pair['verdict'])}",
        html.escape("; ".join(pair["reasons"])),
        _measured(pair),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def markdown(plan: Plan, endpoint: str, now: float | None = None) -> str:
    """The page's table for a page of Markdown; what is not ours stands in code spans."""
    found = document(plan, now)
    counts = ", ".join(f"{kind}: **{n}**" for kind, n in found["counts"].items()) or "nothing"
    lines = [f"{counts}. As of {found['at']}.", "", "| model | recipe | result | state | why | perplexity |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for pair in found["pairs"]:
        cells = [
            _reference(endpoint, pair["model"]),
            code(pair["recipe"]),
            _reference(endpoint, pair["target"]) if pair["result_commit"] else code(pair["target"]),
            f"{MARKS[pair['verdict']]} {pair['verdict']}",
            code("; ".join(pair["reasons"])),
            _measured(pair),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reference(endpoint: str, repo: str) -> str:
    return f"[{code(repo)}]({endpoint}/{quote(repo, safe='/')})"


def _measured(pair: dict[str, Any]) -> str:
    metrics = pair["metrics"] or {}
    before, after = metrics.get("reference_perplexity"), metrics.get("perplexity")
    return f"{before:.4g} → {after:.4g}" if before and after else ""


def _link(endpoint: str, repo: str) -> str:
    return f'<a href="{html.escape(f"{endpoint}/{repo}", quote=True)}">{html.escape(repo)}</a>'


def export(plan: Plan, folder: Path, endpoint: str, now: float | None = None) -> list[Path]:
    """Write `index.html` and `fleet.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "index.html", page(plan, endpoint, now))
    write_text(folder / "fleet.json", json.dumps(document(plan, now), indent=1, ensure_ascii=False) + "\n")
    return [folder / "index.html", folder / "fleet.json"]
