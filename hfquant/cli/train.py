"""`hfquant train`"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from . import engine
from .arguments import Fresh, Json, Model, Out, Set
from .compress import again
from .output import busy, complain, log, print_facts, print_json
from .summary import result

if TYPE_CHECKING:
    from ..train import Training


def train(
    ctx: typer.Context,
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", metavar="NAME|FILE", help="One that trains, such as `quantgpt-w2a8`.", show_default=False
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET|default",
            help="What it learns from: a text, or for encoder-decoders a `.jsonl` of `source` and `target`.",
            show_default=False,
        ),
    ],
    out: Out,
    changes: Set = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--trainer",
            metavar="KEY=VALUE",
            help="Of transformers' TrainingArguments: `bf16=true`, `report_to=wandb`. Repeatable.",
            show_default=False,
        ),
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 500,
    fresh: Fresh = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where it is trained: `cpu`, `cuda`.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train MODEL with its weights on the recipe's grid, and measure the result.

    Before any work everything is checked. A run that was stopped goes on from its last checkpoint. The result is read
    back from disk and compared with the original; the command fails with exit code 3 if its quality collapsed.
    """
    chosen = engine.read_recipe(recipe, changes)
    plan = engine.plan_training(
        model, chosen, text, out, options=options or (), save_every=save_every, fresh=fresh, device=device
    )
    if plan.first:
        print_facts(log(), _facts(plan))
    try:
        done = engine.train(plan, _tell)
        if done is None:  # another process writes
            return
        with busy("reading the result back and comparing it with the original"):
            report = engine.verify(plan.out, against=model)
    except KeyboardInterrupt:
        complain(f"interrupted: the last checkpoint is kept in `{out}`", f"go on with `{again(ctx)}`")
        raise typer.Exit(130) from None
    print_json(report) if as_json else result(out, report)
    engine.judge(report)


def _facts(plan: "Training") -> dict[str, str | None]:
    method = plan.method
    return {
        "recipe": f"{plan.recipe.name}, stored as {plan.wire.format}",
        "text": f"{len(plan.sequences):,} sequences, {method.epochs:g} times, {method.batch} in a step",
        "resuming": None if plan.resume is None else f"from {plan.resume.name}",
    }


def _tell(logs: Mapping[str, float]) -> None:
    """One line of what the Trainer says."""
    terms = [f"{name} {value:.4f}" for name, value in logs.items() if name.startswith("loss")]
    if terms:
        log().print(f"step {logs['step']} of {logs['steps']}: {', '.join(terms)}", markup=False, highlight=False)
