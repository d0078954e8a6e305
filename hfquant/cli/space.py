"""`hfquant space`"""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ResourceError


def space(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Beyond loopback only with OAuth set up.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Where the page answers.")] = 7860,
    fleet: Annotated[Path | None, typer.Option(metavar="FILE", help="A fleet's YAML file: its state is shown.")] = None,
) -> None:
    """Open the web page on this machine: pick a model and a recipe, watch it run, push the result.

    A worker runs beside it. Without OAuth the page is for this machine's user, with this machine's login of the Hub.
    """
    try:
        from space_app.app import serve
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "authlib", "itsdangerous", "dbos", "cryptography", "fastapi", "uvicorn"):
            raise
        raise ResourceError(f"the page needs the package `{error.name}`", "pip install 'hfquant[space]'") from error
    print(f"http://{host}:{port}")
    serve(host, port, fleet)
