"""`hfquant merge`"""

from pathlib import Path
from typing import Annotated

import typer

from . import engine
from .arguments import Folder, Json, Out
from .output import busy, data, print_facts, print_json


def merge(
    folder: Folder,
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="A folder that PEFT's `save_pretrained` wrote.", show_default=False),
    ],
    out: Out,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What both are compared on.", show_default="packaged text"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into the compressed model that it was trained on, and say what rounding it again cost."""
    with busy("merging, and comparing with the unmerged model"):
        report = engine.merge(folder, adapter, out, text=text)
    if as_json:
        return print_json(report)
    found = report["adapter"]
    mean, scores = found["mean"], found["against_unmerged"]
    print_facts(
        data(),
        {
            "model": str(out),
            "layers": f"{len(found['layers'])} with an adapter",
            "adapter": f"{mean['kept']:.0%} of it is left, with an error of {mean['adapter_error']:.0%} of its size",
            "perplexity": f"{scores['unmerged_perplexity']:.3f} -> {scores['perplexity']:.3f}",
            "KL divergence": f"{scores['kl']:.4f} nats per token from the unmerged model",
            "top-1 agreement": f"{scores['top1_agreement']:.1%}",
        },
    )
    return None
