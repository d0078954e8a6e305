"""What is known, as Markdown.  All text that is not ours goes through `code`, which nothing in it can leave."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hfquant.cli.units import between, count, duration, size
from hfquant.conversion.facts import ModelFacts, Preview, Problem
from hfquant.conversion.job import Job
from hfquant.errors import HfquantError
from hfquant.measure.markdown import code, fence, number

FIGURE = re.compile(r"!\[([^\[\]]*)\]\((figures/[a-z0-9-]+\.png)\)")
OTHER = re.compile(r"<(?=/?[a-z])(?!/?(?:details|summary)>)|!(?=\[)", re.IGNORECASE)  # HTML but ours, pictures
MARKS = {"done": "✔", "running": "▶", "failed": "✘", "skipped": "–", "waiting": "·", "stopped": "■"}
WORDS = {
    "preflight": "Check", "resolve": "Find the commit", "download": "Download", "compress": "Compress",
    "evaluate": "Measure", "gate": "Gate", "card": "Write the card", "push": "Push", "verify": "Read back",
    "cleanup": "Tidy up", "run": "Run on Hugging Face Jobs",
}  # fmt: skip
STATES = {
    "queued": "waiting for its turn", "running": "running", "review": "finished; waits for your word before the push",
    "done": "done", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip


def failure(error: HfquantError, said: str = "Not possible") -> str:
    """An error of ours, with the way out."""
    hint = f"\n\n**What helps:** {code(error.hint)}" if error.hint else ""
    return f"**{said}:** {code(error.message)}{hint}"


def facts(model: ModelFacts) -> str:
    """A model's card facts."""
    rows = {
        "parameters": count(model.parameters),
        "weights": f"{size(model.bytes)} in {model.files} file{'s' if model.files != 1 else ''}",
        "stored as": ", ".join(f"{code(kind)} {count(n)}" for kind, n in model.dtypes.items()),
        "architecture": code(model.architecture or model.model_type or "unknown"),
        "licence": code(model.license) if model.license else "none named",
        "access": "open to all" if model.gated is False else "gated: its authors decide who may read it",
        "visibility": "private" if model.private else "public",
        "commit": code(model.revision[:12]),
    }
    return _table(rows)


def preview(found: Preview) -> str:
    """What a conversion would cost and give."""
    parts = [problems(found.problems)]
    if found.bytes_after is not None and found.bytes_before:
        share = found.bytes_after / found.bytes_before
        bits = f", {found.bits_per_weight:.2f} bits per weight" if found.bits_per_weight is not None else ""
        budget = (found.recipe or {}).get("budget") or {}
        about = "" if not budget else "at most " if budget.get("fit") or budget.get("within") else "at least "
        rows = {
            "size": f"{size(found.bytes_before)} → {about}**{size(found.bytes_after)}**",
            "of the original": f"{about}**{share:.0%}**{bits}",
            "memory needed": _known(found.memory, size),
            "disk needed": _known(found.disk, size),
            "time": between(*found.seconds) if found.seconds is not None else "not known before it has begun",
            "price": "free" if not found.usd else f"at most ${found.usd:.2f}, billed to you by Hugging Face",
            "format": code(found.format or "–"),
        }
        parts.append(_table(rows))
        parts.append(f"**Goes to** {_goes_to(found)}")
    if found.runtimes:
        lines = [f"- {'✔' if r.loads else '✘'} **{r.name}**: {r.note}" for r in found.runtimes]
        parts.append("**Who can load the result**\n\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part)


def problems(found: Sequence[Problem]) -> str:
    """What stands in the way, refusals first."""
    lines = []
    for problem in sorted(found, key=lambda p: not p.blocks):
        word = "✘ **Not possible**" if problem.blocks else "⚠ **Note**"
        hint = f" What helps: {code(problem.hint)}" if problem.hint else ""
        lines.append(f"- {word}: {code(problem.message)}{hint}")
    return "\n".join(lines)


def headline(job: Job) -> str:
    """A job in a few lines."""
    name, changes = _recipe(job)
    text = f"### {code(job.request['model'])} with {code(name)}\n\n"
    if changes:
        text += f"{code(changes)}\n\n"
    text += f"**{STATES[job.state]}**"
    if job.state == "queued" and job.place:
        text += f", number {job.place} in the queue"
    if job.state == "running" and job.progress.eta is not None and job.progress.eta >= 1:
        text += f", about {duration(job.progress.eta)} left"
    if job.state == "failed" and job.failure:
        text += "\n\n" + failure(HfquantError(job.failure.message, job.failure.hint), "Why")
    if job.pushed:
        where = f"pull request {job.pushed.pull_request} of " if job.pushed.pull_request else ""
        seen = {True: ", private", False: ", public", None: ""}[job.pushed.private]
        name = f"[{where}{code(job.pushed.repo)}]({job.pushed.url})"
        text += f"\n\nPushed: {name} at commit {code(job.pushed.commit[:12])}{seen}"
    return text


def recipe(job: Job) -> str:
    """The recipe's name in few words; what was changed of it is in the headline."""
    name, changes = _recipe(job)
    return f"{name}, changed" if changes else name


def stepper(job: Job) -> str:
    """The steps of a job as HTML of our own words only."""
    items = []
    for step in job.steps:
        state = "stopped" if step.state == "running" and job.is_final else step.state  # cancelled in the middle of it
        word, mark = WORDS.get(step.name, ""), MARKS[state]
        took = f" <small>{duration(step.seconds)}</small>" if step.seconds is not None and step.seconds >= 1 else ""
        current = ' aria-current="step"' if state == "running" else ""
        items.append(f'<li class="step {state}"{current}><span aria-hidden="true">{mark}</span> {word}'
                     f'<span class="sr"> {state}</span>{took}</li>')  # fmt: skip
    done = job.progress
    bar = ""
    if done.layers and not job.is_final:
        blocks = done.blocks if done.layers_done == done.layers else done.blocks_done
        text = f"{done.layers_done} of {done.layers} layers, {blocks} of {done.blocks} blocks"
        bar = f'<progress max="1" value="{done.share:.4f}" aria-label="compressed">{done.share:.0%}</progress> {text}'
    return f'<ol class="stepper" aria-label="Steps">{"".join(items)}</ol><p class="bar">{bar}</p>'


def comparison(report: Mapping[str, Any]) -> str:
    """Original against compressed."""
    evaluation, source, output = (report.get(name) or {} for name in ("evaluation", "source", "output"))
    compression = report.get("compression") or {}
    lines = [
        "| | original | compressed |", "|---|---:|---:|",
        f"| weights | {_known(source.get('bytes'), size)} | {_known(output.get('bytes'), size)} |",
        f"| perplexity | {number(evaluation.get('reference_perplexity'))} | {number(evaluation.get('perplexity'))} |",
        f"| KL divergence from the original | 0 | {number(evaluation.get('kl'))} |",
        f"| same most likely token | 100% | {number(evaluation.get('top1_agreement'), '.1%')} |",
        f"| tokens per second | {number(evaluation.get('reference_tokens_per_second'), '.1f')}"
        f" | {number(evaluation.get('tokens_per_second'), '.1f')} |",
    ]  # fmt: skip
    if compression.get("seconds") is not None:
        peak = _known(compression.get("peak_memory_bytes"), size)
        lines += ["", f"Compressing took {duration(compression['seconds'])} and {peak} of memory."]
    return "\n".join(lines)


def card(text: str, figures: Mapping[str, str] | None = None) -> str:
    """A model's card: what it says, then its metadata.

    figures: addresses of the card's pictures, by the names that they have in it; no other picture is shown, so that
    nothing is fetched from where a card says.
    """
    metadata = ""
    if text.startswith("---\n"):
        metadata, _, text = text.removeprefix("---\n").partition("\n---\n")
    lines = (_picture(line, figures or {}) for line in text.splitlines())
    body = "\n".join(line for line in lines if line is not None)
    return f"{body}\n\n## Metadata\n\n{fence(metadata, 'yaml')}" if metadata else body


def _picture(line: str, figures: Mapping[str, str]) -> str | None:
    """A line of a card, in which only its own figures are pictures; None for one that is another picture."""
    if found := FIGURE.fullmatch(line):
        return f"![{found[1]}]({figures[found[2]]})" if found[2] in figures else None
    return OTHER.sub(lambda other: {"<": "&lt;", "!": "&#33;"}[other[0]], line)


def history(jobs: Sequence[Job], reports: Mapping[str, Mapping[str, Any] | None]) -> str:
    """A table of jobs."""
    lines = ["| begun | model | recipe | state | size | perplexity / original's |", "|---|---|---|---|---|---|"]
    for job in jobs:
        evaluation, output = ((reports.get(job.id) or {}).get(name) or {} for name in ("evaluation", "output"))
        before, after = evaluation.get("reference_perplexity"), evaluation.get("perplexity")
        cells = [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)),
            code(str(job.request["model"])),
            code(recipe(job)),
            STATES[job.state],
            size(output["bytes"]) if output.get("bytes") else "",
            f"{after / before:.3f}" if after and before else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _recipe(job: Job) -> tuple[str, str]:
    """(name, what was changed of it): a changed recipe is called `name with key=value, ...`."""
    name, _, changes = str(job.request["recipe"]["name"]).partition(" with ")
    return name, changes


def _goes_to(found: Preview) -> str:
    if found.target is None:
        return "nowhere: it is kept for download"
    kind = "there already" if found.exists else f"new, {'private' if found.private else 'public'}"
    return f"{code(found.target)} ({kind})"


def _known(value: Any, form: Any) -> str:
    return "–" if value is None else form(value)


def _table(rows: Mapping[str, str]) -> str:
    """Two columns without a head: the style makes tiles of them."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
