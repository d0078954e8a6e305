"""`hfquant push`"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import engine
from .arguments import Folder, Json
from .output import busy, data, print_facts, print_json
from .units import size

if TYPE_CHECKING:
    from ..conversion.hub import Pushed

Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Who sees a new repository.",
        show_default="private if the original is private or gated",
    ),
]


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="`user/name` on the Hub.", show_default=False)],
    private: Private = None,
    pr: Annotated[bool, typer.Option("--pr", help="Offer the files as a pull request.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Push to this branch.", show_default="main")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also over what hfquant did not make, or did not find good.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a compressed model on the Hub, as one commit, and compare every file with what arrived.

    Log in with `hf auth login` first, or set HF_TOKEN. Interrupted, the same command goes on where it stopped.
    """
    with busy(f"pushing to {repo}"):
        done = engine.push(folder, repo, private=private, pr=pr, revision=revision, force=force)
    print_json(asdict(done)) if as_json else print_facts(data(), facts(done))


def facts(done: "Pushed") -> dict[str, str | None]:
    """What to tell of a push."""
    return {
        "pushed": done.url if done.changed else f"{done.url} (was up to date)",
        "commit": done.commit,
        "files": f"{done.files}, {size(done.bytes)}, all compared with the Hub's",
    }
