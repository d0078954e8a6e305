"""`hfquant generate`"""

from typing import Annotated

import typer

from . import engine
from .arguments import Folder


def generate(
    folder: Folder,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to go on from.", show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="When to stop at the latest.")] = 64,
) -> None:
    """Let a compressed model go on from a prompt, and print each token as it comes.

    The most likely token is always taken, so that the same model gives the same text.
    """
    engine.read_config(folder)
    engine.stream(folder, prompt, max_new_tokens)
