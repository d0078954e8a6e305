"""`hfquant compress`"""

import errno
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, ResourceError
from . import engine, engine_budget, goals
from .arguments import Fresh, Json, Model, Out, Set, Text, Windows, size
from .goals import AverageBits, DryRun, Fastest, Fit, MaxLoss, Within
from .output import busy, complain, log, print_facts, print_json
from .progress import Tally, progress
from .push import Private, facts
from .summary import estimate, result

if TYPE_CHECKING:
    from ..compress import Plan
    from ..compress.plan import Outlook
    from ..recipe import Recipe


def compress(
    ctx: typer.Context,
    model: Model,
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="`gptq-w4g128`, another name that `hfquant recipes` explains, or a YAML file.",
            show_default=False,
        ),
    ] = None,
    out: Out,
    changes: Set = None,
    fit: Fit = None,
    average_bits: AverageBits = None,
    max_loss: MaxLoss = None,
    fastest: Fastest = False,
    within: Within = None,
    dry_run: DryRun = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET|self|random",
            help="Calibration text: a file, a Hub dataset, `self` for the model's own, or `random` tokens.",
            show_default="packaged text",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calibration sequences.", show_default="recipe's")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=8, metavar="L", help="Tokens in each of them.", show_default="recipe's")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="S", help="Chooses them.", show_default="recipe's")] = None,
    fresh: Fresh = False,
    max_memory: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", help="Refuse to start if more is needed: `700MB`, `2GiB`."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where the work is done: `cpu`, `cuda`, `cuda:1`.")
    ] = "cpu",
    text: Text = None,
    windows: Windows = 64,
    crew: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="Who shares the work: `cuda:0,cuda:1`, `ray`, `ray:ADDRESS`, `ray:local`.",
            show_default="this process",
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Pieces that a crew's work is cut into.", show_default="8"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of each worker of a cluster.", show_default="1")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Push the result to the Hub if it is good enough.", show_default=False),
    ] = None,
    private: Private = None,
    as_json: Json = False,
) -> None:
    """Compress MODEL into a folder that loads in transformers, and measure what it cost.

    Before any work everything is checked and an estimate is printed.  Afterwards the result is read back from
    disk and compared with the original; the command fails with exit code 3 if its quality collapsed.

    With a goal in place of a recipe (`--fit 2.5GB`) the model is looked at first, and the bits of every layer chosen.
    """
    named = {"fit": fit, "average_bits": average_bits, "max_loss": max_loss, "fastest": fastest, "within": within}
    chosen = goals.with_goal(recipe, changes, **named)
    if dry_run and chosen.budget is None:
        raise RecipeError("`--dry-run` says what a goal leads to, and there is none", "give one, such as `--fit 2.5GB`")
    if push:
        engine.check_push(push, private=private)  # now, not after hours of work
    settings: dict[str, Any] = {"calibration": calibration, "samples": samples, "seq_len": seq_len, "seed": seed}
    work: dict[str, Any] = {"max_memory": max_memory, "device": device}
    if crew is not None or parts is not None or threads is not None:
        work |= {"crew": engine.crew(crew, parts=parts, threads=threads, device=device), "device": "cpu"}

    def announced(found: "Outlook") -> None:
        print_facts(log(), estimate(found, windows))
        if chosen.budget is None:  # with a goal it was checked before the model was looked at
            engine.check_text(found.source, text)

    def done(source: Any, recipe: "Recipe", again: bool = False) -> dict[str, Any]:
        plan = engine.plan(source, recipe, out, **settings, **work, fresh=fresh or again, announce=announced)
        _run(ctx, plan)
        return _measure(plan, model, text, windows)

    if chosen.budget is None:
        report = done(model, chosen)
    else:
        case = engine_budget.open_case(model, chosen, out, **settings, fresh=fresh, device=device, text=text)
        engine.check_text(case.source, text)
        if dry_run:
            goals.show(case, as_json)
            return
        report = goals.reach(case, lambda recipe, again: done(case.source, recipe, again))
    print_json(report) if as_json else result(out, report)
    engine.judge(report)
    if push:
        _push(out, push, private)


def _run(ctx: typer.Context, plan: "Plan") -> None:
    """The work itself.  Interrupted, it says what is kept and how to go on."""
    tally = Tally(plan.layers, plan.resumed)
    try:
        with progress(tally, log()) as show:
            for layer in engine.layers(plan):
                show(layer)
                for note in layer.notes:
                    log().print(f"{layer.name}: {note}", markup=False)
    except KeyboardInterrupt:
        complain(
            f"interrupted: {tally.blocks_done} of {plan.blocks} blocks are finished and kept in `{plan.out}`",
            f"go on with `{again(ctx)}`",
        )
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(
            f"the disk is full; {tally.blocks_done} of {plan.blocks} blocks are kept in `{plan.out}`",
            f"free some space, then go on with `{again(ctx)}`",
        ) from error


def _measure(plan: "Plan", model: str, text: Path | None, windows: int) -> dict[str, Any]:
    try:
        with busy("reading the result back and comparing it with the original"):
            return engine.verify(plan.out, against=model, text=text, windows=windows)
    except KeyboardInterrupt:
        words = ["hfquant", "eval", str(plan.out), "--against", model, "--windows", str(windows)]
        words += ["--text", str(text)] if text else []
        complain(f"interrupted: `{plan.out}` is complete but not measured", f"measure it with `{shlex.join(words)}`")
        raise typer.Exit(130) from None


def _push(out: Path, repo: str, private: bool | None) -> None:
    words = shlex.join(["hfquant", "push", str(out), repo])
    try:
        with busy(f"pushing to {repo}"):
            done = engine.push(out, repo, private=private)
    except KeyboardInterrupt:
        complain(f"interrupted: `{out}` is complete but not pushed", f"push it with `{words}`")
        raise typer.Exit(130) from None
    print_facts(log(), facts(done))


def again(ctx: typer.Context) -> str:
    """The command line that was given, without `--fresh`."""
    words = ["hfquant", str(ctx.info_name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name == "fresh":
            continue
        value = ctx.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        elif value is False:
            words.append(parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)
