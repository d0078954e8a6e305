"""`hfquant offload plan`, `hfquant offload profile`, and what `hfquant generate --offload` does."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import engine_offload
from .arguments import Json, size
from .output import complain, data, log, print_facts, print_json
from .units import duration
from .units import size as said

if TYPE_CHECKING:
    from ..runtime.offload.planning import OffloadPlan

app = typer.Typer(no_args_is_help=True, help="Run models that do not fit into memory.")
Memory = Annotated[
    int | None,
    typer.Option(
        "--host-memory",
        parser=size,
        metavar="SIZE",
        help="What the process may take: `2GiB`.",
        show_default="what is free",
    ),
]
Disk = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where temporary files go.", show_default="the system's")
]
Bits = Annotated[int, typer.Option(metavar="16|8|4|2", help="Bits of the KV cache; 16 leaves it as it is.")]
Top = Annotated[
    float,
    typer.Option(
        "--attention-top", metavar="SHARE", help="Share of the tokens whose values a new one uses: 0.1 for a tenth."
    ),
]
Latency = Annotated[
    float | None, typer.Option(min=0.001, metavar="SECONDS", help="Longest time a block of prompts may take.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="TYPE", help="What is computed in: `float32`.", show_default="what is stored")
]


@app.command("plan")
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id, dense or compressed.")],
    prompt_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 512,
    gen_len: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate for each.")] = 32,
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="How many prompts there are.")] = 64,
    host_memory: Memory = None,
    disk: Disk = None,
    cache_bits: Bits = 16,
    attention: Top = 1.0,
    latency: Latency = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Find the fastest policy for MODEL within a budget, and say what it will take.

    One block of the model is run to measure it.
    """
    found = engine_offload.plan(
        model, prompt_len, gen_len, prompts, host_memory=host_memory, disk=disk, cache_bits=cache_bits,
        attention=attention, latency=latency, dtype=dtype,
    )  # fmt: skip
    print_json(document(found)) if as_json else print_facts(data(), facts(found))


@app.command("profile")
def profile(
    disk: Disk = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what this machine and its disk can do; remembered for a week."""
    found = engine_offload.hardware(disk, fresh)
    print_json(vars(found)) if as_json else print_facts(data(), found.lines())


def facts(plan: "OffloadPlan") -> dict[str, str | None]:
    """A plan in words."""
    policy, p = plan.solved.policy, plan.solved.prediction
    more = [f"{said(memory)}: {s.prediction.tokens_per_second:.3g} tokens/s" for memory, s in plan.more.items()]
    return {
        "policy": f"{policy.batches} batches of {policy.batch} prompts share a load of a layer",
        "weights": f"{said(policy.weights)} stay in memory, {policy.depth} layers are read ahead",
        "prompts": f"pass in chunks of {policy.chunk} tokens" if policy.chunk else "pass whole",
        "cache": f"{policy.cache_bits} bit, {policy.cache_on_disk} layers on disk ({said(p.disk)})",
        "memory": f"{said(p.peak)} at most, of {said(plan.memory)}",
        "start": f"{p.start:.3g} s until what stays in memory is there" if p.start else None,
        "first pass": _stage(p.prefill),
        "following passes": _stage(p.decode),
        "bottleneck": p.bottleneck,
        "total": f"{duration(p.seconds)} for {plan.work.prompts} prompts, {p.tokens_per_second:.3g} tokens/s",
        "with more memory": "; ".join(more),
        "note": plan.note(),
        **plan.hardware.lines(),
    }


def _stage(one: Any) -> str:
    parts = [("compute", one.compute), ("disk", one.disk), ("processor", one.processor)]
    return f"{one.seconds:.3g} s ({', '.join(f'{name} {seconds:.3g} s' for name, seconds in parts)})"


def document(plan: "OffloadPlan") -> dict[str, Any]:
    """A plan as data."""
    p = plan.solved.prediction
    return {
        "policy": plan.solved.policy.to_dict(),
        "seconds": p.seconds,
        "tokens_per_second": p.tokens_per_second,
        "latency": p.latency,
        "peak_bytes": p.peak,
        "disk_bytes": p.disk,
        "start": p.start,
        "prefill": vars(p.prefill) | {"seconds": p.prefill.seconds},
        "decode": vars(p.decode) | {"seconds": p.decode.seconds},
        "bottleneck": p.bottleneck,
        "more_memory": {str(m): s.prediction.tokens_per_second for m, s in plan.more.items()},
        "hardware": vars(plan.hardware),
    }


class Meter:
    """How far a batch is, and how long the rest will take: a line on stderr from time to time."""

    def __init__(self, total: int, every: float = 10.0) -> None:
        self.total, self.every, self.tokens = total, every, 0
        self._start = self._said = time.monotonic()

    def __call__(self, tokens: int) -> None:
        self.tokens += tokens
        now = time.monotonic()
        if now - self._said >= self.every:
            self._said = now
            log().print(str(self), markup=False)

    def saved(self, tokens: int) -> None:
        """A sequence ended with so many tokens left: they need not be waited for."""
        self.total = max(self.tokens, self.total - tokens)

    def __str__(self) -> str:
        """`12%  384 of 3200 tokens  4.1 tokens/s  left 11 min 20 s`"""
        elapsed = max(1e-9, time.monotonic() - self._start)
        rate = self.tokens / elapsed
        left = duration((self.total - self.tokens) / rate) if rate else "unknown"
        share = self.tokens / max(1, self.total)
        return f"{share:4.0%}  {self.tokens} of {self.total} tokens  {rate:.3g} tokens/s  left {left}"


def batch(model: str, source: Path, out: Path, **settings: Any) -> None:
    """Answer a file of prompts.  Interrupted, it says what is kept."""
    answers = engine_offload.answers(model, source, out, settings)
    try:
        engine_offload.answer(model, answers, Meter, **settings)
    except KeyboardInterrupt:
        complain(
            f"interrupted: {len(answers.done)} of {len(answers.prompts)} answers are kept in `{answers.part}`",
            "the same command goes on from there",
        )
        raise typer.Exit(130) from None
