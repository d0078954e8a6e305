"""Every pair of a model and a recipe that a manifest asks for, at the commit that the model has now."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import HfquantError
from ...recipe import Recipe
from ..request import Request
from .manifest import Entry, Manifest, Terms
from .sight import Original, Sight

AT_ONCE = 8  # requests to the Hub
AHEAD = 256  # of those that wait for their turn; a whole fleet's would take more memory than what is known of it
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One conversion that should exist.  original: None if it cannot be read, for the reason in `trouble`."""

    model: str
    revision: str
    recipe: str
    chosen: Recipe
    target: str
    terms: Terms
    original: Original | None
    trouble: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.recipe}"

    def request(self) -> Request:
        """What to ask the service for, at exactly this commit."""
        terms, rented = self.terms, self.terms.executor == "hf-jobs"
        asked: dict[str, Any] = {
            "model": self.model,
            "revision": self.original.commit if self.original else self.revision,
            "recipe": self.chosen.model_dump(mode="json"),
            "target": self.target,
            "private": terms.private,
            "pull_request": terms.push == "pr",
            "accept_terms": bool(terms.accept_terms),
            "executor": terms.executor or "local",
            "hardware": terms.flavor,
            "max_usd": terms.max_usd if rented else None,
            "timeout": terms.timeout,
        }
        return Request.parse(asked)


def at_once(ask: Callable[[S], T], about: Sequence[S]) -> list[T]:
    """Ask about each, some at the same time; the answers are in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [found for at in range(0, len(about), AHEAD) for found in pool.map(ask, about[at : at + AHEAD])]


def wanted(manifest: Manifest, sight: Sight, models: Sequence[str] | None = None) -> list[Wanted]:
    """All pairs in the manifest's order, each target once: an earlier entry goes before a later one.

    models: only these.
    """
    named = [(model, entry) for entry in manifest.models for model in _models(entry, sight, models)]
    places = list(dict.fromkeys((model, entry.revision) for model, entry in named))
    read = dict(zip(places, at_once(lambda place: _read(sight, *place), places), strict=True))
    recipes: dict[tuple[str, str], Recipe] = {}
    found: dict[str, Wanted] = {}
    for model, entry in named:
        for pair in _pairs(manifest, entry, model, *read[model, entry.revision], recipes):
            found.setdefault(pair.target.lower(), pair)
    return list(found.values())


def _models(entry: Entry, sight: Sight, models: Sequence[str] | None) -> Iterator[str]:
    ids = [entry.id] if entry.id is not None else sight.found(entry.search, entry.limit)  # type: ignore[arg-type]
    yield from (model for model in ids if models is None or model in models)


def _read(sight: Sight, model: str, revision: str) -> tuple[Original | None, str | None]:
    try:
        return sight.original(model, revision), None
    except HfquantError as error:
        return None, error.message


def _pairs(
    manifest: Manifest, entry: Entry, model: str, original: Original | None, trouble: str | None,
    recipes: dict[tuple[str, str], Recipe],
) -> Iterator[Wanted]:  # fmt: skip
    terms = entry.over(manifest.defaults)
    gate = "" if terms.gates is None else terms.gates.model_dump_json()
    for name in entry.recipes:
        if (name, gate) not in recipes:
            recipe = manifest.recipe(name)
            recipes[name, gate] = recipe if terms.gates is None else recipe.model_copy(update={"gate": terms.gates})
        target = manifest.target(terms.namespace, model, name)
        yield Wanted(model, entry.revision, name, recipes[name, gate], target, terms, original, trouble)
