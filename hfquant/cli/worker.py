"""`hfquant worker`"""

import signal
from typing import Annotated

import typer

from . import engine_service
from .arguments import size


def worker(
    at_once: Annotated[int, typer.Option(min=1, metavar="N", help="Jobs that it works on at the same time.")] = 1,
    per_user: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Jobs of one user that run at the same time, on all workers.", show_default="1"
        ),
    ] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when no job waits or runs any more.")] = False,
    max_memory: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", help="Of one job.", show_default="3/4 of the machine's"),
    ] = None,
    max_disk: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="Of one job.", show_default="100GB")
    ] = None,
    max_seconds: Annotated[
        int | None, typer.Option(min=1, metavar="S", help="Of one job's work.", show_default="six hours")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of text, that results are measured on.", show_default="64")
    ] = None,
    new_secret: Annotated[bool, typer.Option("--new-secret", help="Print a key for HFQUANT_SECRET, and end.")] = False,
) -> None:
    """Work on the jobs of the conversion service, one after the other.

    HFQUANT_DATABASE and HFQUANT_FOLDER say where jobs are written down and worked on. Start it again after a crash,
    or several of them: a job goes on where it was, and none is done twice.
    """
    if new_secret:
        print(engine_service.new_secret())
        return
    limits = {"memory": max_memory, "disk": max_disk, "seconds": max_seconds, "running_per_user": per_user}
    made = engine_service.worker(at_once, windows, limits)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, made.stop)
    made.run(made.is_idle if until_idle else None)
