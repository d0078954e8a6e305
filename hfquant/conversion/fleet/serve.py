"""A fleet kept up to date by webhooks, alone or beside the Space."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import APIRouter

from ..database import Database
from ..service import Service
from .inbox import Inbox
from .manifest import Manifest, read_manifest
from .reconcile import Asked, apply, make_plan
from .sight import HubSight
from .wanted import wanted
from .webhook import Handler, router


@contextmanager
def attached(
    fleet: Path, service: Service, secret: str | None, user: str, token: str | None = None
) -> Iterator[APIRouter]:
    """Within: a webhook's route, and a thread that has what it tells of converted.

    Raises FleetError before anything is opened: no secret, no manifest.
    """
    read_manifest(fleet)
    sight = HubSight(token)

    def handle(model: str) -> list[Asked]:
        manifest = read_manifest(fleet)  # as it is now: a fleet is changed while this runs
        if not concerns(manifest, sight, model):
            return []
        plan = make_plan(
            manifest, sight, jobs=service.jobs(user, limit=1000), limits=service.settings.limits, models=[model]
        )
        return apply(plan, service, user, token)

    database = Database(service.settings.database)
    inbox = Inbox(database)
    handler = Handler(inbox, handle)
    routes = router(secret, inbox, lambda repo: is_own(read_manifest(fleet), repo), handler.wake)
    handler.start()
    try:
        yield routes
    finally:
        handler.stop()
        database.close()


def concerns(manifest: Manifest, sight: HubSight, model: str) -> bool:
    """Whether the fleet wants anything of a model."""
    return any(entry.id == model for entry in manifest.models) or bool(
        any(entry.search for entry in manifest.models) and wanted(manifest, sight, [model])
    )


def is_own(manifest: Manifest, repo: str) -> bool:
    """Whether a repository is one that results go to: in one of the fleet's namespaces, and no original of it."""
    owner = repo.partition("/")[0]
    namespaces = {entry.over(manifest.defaults).namespace for entry in manifest.models}
    return owner in namespaces and all(entry.id != repo for entry in manifest.models)
