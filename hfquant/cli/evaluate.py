"""`hfquant eval`"""

from pathlib import Path
from typing import Annotated

import typer

from . import engine
from .arguments import Folder, Json, Text, Windows
from .output import busy, data, print_facts, print_json
from .summary import scores


def evaluate(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original, if the report does not know it.", show_default=False),
    ] = None,
    text: Text = None,
    windows: Windows = 64,
    window_len: Annotated[int, typer.Option(min=8, metavar="L", help="Tokens in each window.")] = 512,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Arithmetic: `auto`, `float32`, `bfloat16`, `float16`.")
    ] = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Also ask questions: of arc_easy, hellaswag, piqa, winogrande 100 each, which come with hfquant; of "
            "other names lm-eval's, from the Hub.",
            show_default=False,
        ),
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the tasks lie, a file each: no network is needed.", exists=True, file_okay=False
        ),
    ] = None,
    whole_tasks: Annotated[
        bool, typer.Option("--whole-tasks", help="All of lm-eval's own questions, from the Hub, instead of 100.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Questions of each task.", show_default="all")
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            metavar="KERNELS", help="`exact`: scores of the weights; `auto`: of what runs, input rounding included."
        ),
    ] = "exact",
    as_json: Json = False,
) -> None:
    """Measure a compressed model: perplexity, and how far it is from the original.

    Windows do not overlap.  The numbers, with all settings, also go into DIR/report.json and its card.
    Exit code 3 says that the quality is below the recipe's gate.
    """
    engine.read_config(folder)
    asked = None if tasks is None else engine.tasks(tasks, task_files, limit, whole_tasks)
    if asked is None and (task_files or limit or whole_tasks):
        raise typer.BadParameter("`--task-files`, `--whole-tasks` and `--limit` belong to `--tasks`")
    if task_files and whole_tasks:
        raise typer.BadParameter("the questions are either those of `--task-files` or lm-eval's")
    with busy("measuring"):
        report = engine.verify(
            folder,
            against=against,
            text=text,
            windows=windows,
            window_len=window_len,
            dtype=dtype,
            tasks=asked,
            kernels=kernels,
        )
    if as_json:
        print_json({key: report.get(key) for key in ("evaluation", "sample", "gate")})
    else:
        print_facts(data(), {"model": str(folder)} | scores(report))
    if report["evaluation"].get("reference_perplexity") is not None:
        engine.judge(report)
