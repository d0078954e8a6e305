"""What a config may say before anything is built from it: numbers as models have them, no deeper and no longer."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import SourceError

MAX_CHARACTERS = 5_000_000
MAX_DEPTH = 20
LAYERS, EXPERTS = re.compile(r"(?:^|_)(?:layers?|blocks?)$", re.ASCII), re.compile(r"(?:^|_)experts$", re.ASCII)
MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 2_048, 32_768, 50_000_000
FREE = re.compile(r"token|_id$|_ids$|position|length|theta|factor|window|period|seed", re.ASCII)


def check_config(raw: Any, name: str) -> None:
    """Raises SourceError for a config.json whose numbers no model has: building it would take hours, or all memory."""
    if not isinstance(raw, Mapping):
        raise SourceError(f"config.json of {name} is not a JSON object", "download the model again")
    for key, value in _numbers(raw, name):
        most = MAX_LAYERS if LAYERS.search(key) else MAX_EXPERTS if EXPERTS.search(key) else MAX_WIDTH
        if value > most and not FREE.search(key):
            raise SourceError(
                f"config.json of {name} says `{key[:80]}` is {value:,}, more than {most:,}",
                "check config.json: no model that hfquant knows is built like this",
            )


def _numbers(value: Any, name: str, key: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every whole number in a document with the key it stands under."""
    if depth > MAX_DEPTH:
        raise SourceError(f"config.json of {name} is nested more than {MAX_DEPTH} deep", "check config.json")
    if isinstance(value, Mapping):
        for inner, found in value.items():
            yield from _numbers(found, name, str(inner), depth + 1)
    elif isinstance(value, list):
        for found in value:
            yield from _numbers(found, name, key, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
