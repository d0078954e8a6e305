"""Asking the Hub to tell of new commits."""

from typing import Any

from huggingface_hub import HfApi

from ..retry import patiently
from ..retry import understood as hub_understood
from .manifest import Manifest


def watch(manifest: Manifest, secret: str, *, job: str | None = None, url: str | None = None) -> dict[str, Any]:
    """Make a webhook on all that a fleet follows: its models, and the owners of what it searches.

    job: of Hugging Face Jobs, begun again for every event with the message in WEBHOOK_PAYLOAD.  url: called instead.
    Raises HubError.
    """
    models = [entry.id for entry in manifest.models if entry.id is not None]
    authors = [e.search.author for e in manifest.models if e.search is not None and e.search.author is not None]
    watched = [{"type": "model", "name": name} for name in dict.fromkeys(models)]
    watched += [{"type": "user", "name": name} for name in dict.fromkeys(authors)]
    with hub_understood():
        made = patiently(
            lambda: HfApi().create_webhook(url=url, job_id=job, watched=watched, domains=["repo"], secret=secret)  # type: ignore[arg-type]
        )
    return {"id": made.id, "watched": [entry["name"] for entry in watched], "job": job, "url": url}
