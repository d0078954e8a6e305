"""The command line.

Data goes to stdout, everything else to stderr.  Exit codes: 0 done, 2 a mistake in the command or its input,
3 the result was written but failed its gate, 130 interrupted.  No module here imports torch or transformers
before a command runs.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import HfquantError
from ..memory import huge_pages
from . import (
    bench,
    compress,
    diagnose,
    evaluate,
    export,
    fleet,
    generate,
    inspect,
    jobs,
    merge,
    offload,
    push,
    recipes,
    space,
    train,
    worker,
)
from .output import complain


class Commands(TyperGroup):
    """Turns what the user can fix into a message, a hint and an exit code, for every command alike."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HfquantError as error:
            complain(error.message, error.hint)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="hfquant",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a bug deserves the plain traceback, without the values of variables
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("eval")(evaluate.evaluate)
app.command("diagnose")(diagnose.diagnose)
app.command("bench")(bench.bench)
app.command("inspect")(inspect.inspect)
app.command("recipes")(recipes.recipes)
app.command("generate")(generate.generate)
app.command("push")(push.push)
app.command("export")(export.export)
app.command("worker")(worker.worker)
app.add_typer(jobs.app, name="jobs")
app.command("space")(space.space)
app.add_typer(offload.app, name="offload")
app.add_typer(fleet.fleet)
app.add_typer(fleet.webhooks)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"hfquant {__version__}")
        raise typer.Exit


@app.callback()
def hfquant(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress generative language models, measure what it cost, and load them again with transformers."""


def main() -> None:
    """The `hfquant` program."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars that redraw have no place in a log
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers asks a Space to convert pickles
    huge_pages()
    app()
