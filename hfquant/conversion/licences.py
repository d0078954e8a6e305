"""What a licence allows to be made of a model, as far as its name tells."""

import re
from collections.abc import Mapping
from typing import Any

from .facts import Problem

RESTRICTED = {
    re.compile(r"(^|-)nd(-|$)", re.ASCII): "forbids changed copies",
    re.compile(r"(^|-)nc(-|$)", re.ASCII): "allows no commercial use",
    re.compile(r"non-?commercial|research|academic|evaluation", re.ASCII): "allows research or other use only",
}
OWN_TERMS = re.compile(
    r"^(other|llama|gemma|openrail|bigscience|creativeml|deepfloyd|apple|h-research|intel)", re.ASCII
)


def problem(facts: Mapping[str, Any], accepted: bool) -> Problem | None:
    """What stands in the way of compressing and publishing a model with these facts (`model.hub.facts`).

    accepted: whether its user says that the terms were read and allow this.
    """
    named = str(facts.get("license") or "").lower()
    title = f"{named} {facts.get('license_name') or ''}".lower().strip()
    if not named:
        return Problem(
            "license", "the model names no licence", "ask its authors before you publish the result", blocks=False
        )
    for pattern, meaning in RESTRICTED.items():
        if any(pattern.search(word) for word in title.split()):
            hint = None if accepted else "confirm that you have read its terms and keep them (`accept_terms`)"
            return Problem("license", f"the licence {title[:80]} {meaning}", hint, blocks=not accepted)
    if OWN_TERMS.search(named):
        said = f"the model has terms of its own ({title[:80]})"
        return Problem("license", said, "read them: they go with the result", blocks=False)
    return None
