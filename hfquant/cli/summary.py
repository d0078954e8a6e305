"""Plans and reports as a few lines of text."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import data, print_facts
from .units import count, duration, size

if TYPE_CHECKING:
    from ..compress.plan import Outlook


def estimate(plan: "Outlook", windows: int) -> dict[str, str | None]:
    """What a compression will need and give.  windows: of text, that the result will be measured on."""
    expected, after = plan.estimate, plan.measuring(windows)
    took = None if expected.seconds is None else f"about {duration(expected.seconds)}"
    untied = getattr(plan.source, "about", {}).get("untied_bytes")
    share = expected.bytes_after / max(1, expected.bytes_before)
    return {
        "recipe": f"{plan.recipe.name}, stored as {plan.wire.format}",
        "parameters": f"{count(expected.parameters)}, {len(plan.layers)} layers in {plan.blocks} blocks",
        "output size": f"{size(expected.bytes_after)} ({share:.0%} of {size(expected.bytes_before)})",
        "head": f"a weight of its own, {size(untied)} in the source's type" if untied else None,
        "peak memory": f"{size(expected.peak_memory)}, {size(after.peak_memory)} to measure the result",
        "disk": size(expected.disk),
        "time": took and f"{took}, {duration(after.seconds)} to measure the result",
        "resuming": f"{plan.resumed} of {plan.blocks} blocks are done" if plan.resumed else None,
    }


def result(out: Path, report: Mapping[str, Any]) -> None:
    """The outcome of `compress`, on stdout."""
    work = report.get("compression") or {}
    before, after = (report.get("source") or {}).get("bytes"), (report.get("output") or {}).get("bytes")
    memory = work.get("peak_memory_bytes")
    spent = [duration(work["seconds"])] if work.get("seconds") is not None else []
    facts = {
        "model": str(out),
        "size": f"{size(before)} -> {size(after)} ({after / before:.0%})" if before and after else None,
        "compression": ", ".join([*spent, *([f"peak memory {size(memory)}"] if memory else [])]) or None,
    }
    print_facts(data(), facts | scores(report))


def scores(report: Mapping[str, Any]) -> dict[str, str | None]:
    """What was measured."""
    found = report.get("evaluation") or {}
    ppl, reference = found.get("perplexity"), found.get("reference_perplexity")
    sample = (report.get("sample") or {}).get("compressed")
    return {
        "perplexity": _perplexity(ppl, reference, found.get("growth_error")),
        "KL divergence": None if found.get("kl") is None else f"{found['kl']:.4f} nats per token",
        "top-1 agreement": None if found.get("top1_agreement") is None else f"{found['top1_agreement']:.1%}",
        "speed": _speed(found.get("tokens_per_second"), found.get("reference_tokens_per_second")),
        "memory": _memory(found.get("generation_memory_bytes"), found.get("reference_generation_memory_bytes")),
        **_tasks(found.get("tasks") or {}),
        "measured on": f"{found['tokens']} tokens" if found.get("tokens") else None,
        "sample": None if sample is None else " ".join(str(sample).split()),
    }


def _memory(after: float | None, before: float | None) -> str | None:
    if after is None:
        return None
    return f"{size(after)} while decoding" + ("" if before is None else f" (original: {size(before)})")


def _tasks(tasks: Mapping[str, Any]) -> dict[str, str | None]:
    told: dict[str, str | None] = {}
    for name, task in tasks.items():
        for metric, score in task["scores"].items():
            before = "" if score["original"] is None else f"{score['original']:.1%} -> "
            told[f"{name}, {metric}"] = f"{before}{score['value']:.1%} of {task['n']}"
    return told


def _speed(after: float | None, before: float | None) -> str | None:
    if after is None:
        return None
    return f"{after:.1f} tokens/s" + ("" if before is None else f" (original: {before:.1f})")


def _perplexity(ppl: float | None, reference: float | None, error: float | None) -> str | None:
    """error: standard, of the logarithm of their quotient."""
    if ppl is None:
        return None
    if reference is None:
        return f"{ppl:.2f}"
    ratio = ppl / reference
    sure = "" if error is None else f" ± {ratio * error:.3f}"
    return f"{reference:.2f} -> {ppl:.2f} (x {ratio:.3f}{sure})"
