"""What is on the Hub: the originals, and what stands where their results go."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from ...errors import SourceError
from ...model.hub import facts, understood
from ..provenance import FILE, SCHEMA
from ..retry import insisting, patiently
from ..retry import understood as hub_understood
from ..verify import Remote, read_text
from .manifest import Search

Token = str | bool | None
FOUND = ["downloads", "sha", "safetensors", "gated", "private", "cardData", "disabled", "config"]


@dataclass(frozen=True, slots=True)
class Original:
    """A model at a commit.  parameters: None where the Hub does not say."""

    id: str
    commit: str
    parameters: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What stands where a result goes.

    made: its `hfquant.json` without the files, None if it has none.  empty: a repository without files.  broken: what
    is wrong with it.
    """

    exists: bool
    commit: str | None = None
    made: Mapping[str, Any] | None = None
    empty: bool = False
    broken: str | None = None


class Sight(Protocol):
    """The Hub, or a record of it."""

    def original(self, model: str, revision: str) -> Original:
        """Raises SourceError if it cannot be read."""
        ...

    def found(self, search: Search, limit: int) -> Sequence[str]:
        """Ids, most downloaded first."""
        ...

    def result(self, repo: str) -> Result: ...


class HubSight:
    """The real one: two or three requests for each repository, none for a file of weights."""

    def __init__(self, token: Token = None) -> None:
        self._api = HfApi(token=token)

    def original(self, model: str, revision: str) -> Original:
        with understood(model, revision):
            return seen(insisting(lambda: self._api.model_info(model, revision=revision, expand=FOUND)))  # type: ignore[arg-type]

    def found(self, search: Search, limit: int) -> Sequence[str]:
        listed = patiently(
            lambda: list(
                self._api.list_models(
                    author=search.author, search=search.text, pipeline_tag=search.pipeline,
                    filter=list(search.tags) or None, sort="downloads", limit=None if search.max_params else limit,
                    expand=["safetensors", "downloads"],
                )
            )
        )  # fmt: skip
        small = [m.id for m in listed if not search.max_params or (_parameters(m) or 0) <= search.max_params]
        return small[:limit]

    def result(self, repo: str) -> Result:
        with hub_understood():
            return self._result(repo)

    def _result(self, repo: str) -> Result:
        try:
            remote = insisting(lambda: Remote.read(self._api, repo, "main"))
        except RepositoryNotFoundError:
            return Result(False)
        if remote is None:
            return Result(True, empty=True)
        if FILE not in remote.files:
            return Result(True, remote.commit, empty=remote.files.keys() <= {".gitattributes"})
        try:
            made = json.loads(insisting(lambda: read_text(self._api, repo, remote.commit, FILE)))
        except (ValueError, RemoteEntryNotFoundError):
            return Result(True, remote.commit, broken=f"its {FILE} cannot be read")
        if not isinstance(made, dict) or made.get("schema") != SCHEMA:
            return Result(True, remote.commit, broken=f"its {FILE} is not of this version")
        broken = _missing(made, remote)
        made.pop("files", None)  # they are compared, and many: a fleet's plan holds all results
        return Result(True, remote.commit, made, broken=broken)


def seen(info: ModelInfo) -> Original:
    """Raises SourceError for a repository without a commit."""
    if not info.sha:
        raise SourceError(f"{info.id} has no commit", "give a repository that has files")
    quantized = bool((getattr(info, "config", None) or {}).get("quantization_config"))
    return Original(info.id, info.sha, _parameters(info), facts(info), quantized)


def _parameters(info: ModelInfo) -> int | None:
    return info.safetensors.total if info.safetensors is not None else None


def _missing(made: Mapping[str, Any], remote: Remote) -> str | None:
    """Whether the files are those that were pushed, as far as the listing tells."""
    for listed in made.get("files") or ():
        file = remote.files.get(str(listed.get("path")))
        if file is None:
            return f"{listed.get('path')} is missing"
        if file.size != listed.get("size") or (file.lfs and file.lfs.sha256 != listed.get("sha256")):
            return f"{listed.get('path')} is not what was pushed"
    return None
