"""The Hub's answers, as Python values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfquant import __version__
from hfquant.conversion.fleet.manifest import Manifest, Search
from hfquant.conversion.fleet.sight import Original, Result
from hfquant.errors import SourceError
from hfquant.recipe import Recipe
from hfquant.recipe_errors import validate


@dataclass
class Recorded:
    """models: id -> commit, or an Original.  results: repository -> what stands there."""

    models: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def original(self, model: str, revision: str) -> Original:
        self.asked.append(model)
        if model not in self.models:
            raise SourceError(f"{model} is not on the Hub, or private")
        found = self.models[model]
        return found if isinstance(found, Original) else Original(model, found, 1_000_000, {"license": "mit"})

    def found(self, search: Search, limit: int) -> Sequence[str]:
        return [m for m in self.models if search.author is None or m.startswith(f"{search.author}/")][:limit]

    def result(self, repo: str) -> Result:
        self.asked.append(repo)
        return self.results.get(repo, Result(False))


def made(model: str, commit: str, recipe: str, version: str = __version__, **changes: Any) -> Result:
    """A result of ours."""
    document: Mapping[str, Any] = {
        "schema": 1,
        "base": {"id": model, "revision": commit},
        "recipe": {"hash": Recipe.parse(recipe).hash},
        "versions": {"hfquant": version},
        "files": [],
    }
    return Result(True, "c" * 40, {**document, **changes})


def manifest(**changes: Any) -> Manifest:
    data: dict[str, Any] = {
        "version": 1,
        "defaults": {"namespace": "acme"},
        "models": [{"id": "org/one", "recipes": ["rtn-w4g64", "rtn-w8"]}, {"id": "org/two", "recipes": ["rtn-w8"]}],
    }
    return validate(Manifest, data | changes, "the fleet")
