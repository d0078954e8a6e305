"""Fetching a model from the Hub: looked at first, then only the files that are needed, never code, never pickles."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ResourceError, SourceError
from .remote import look, read_headers

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TEXTS = ["*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.vocab", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
TERMS = ("license", "license_name", "license_link")
MARGIN = 200_000_000  # bytes of disk that are left alone


class Fetched(NamedTuple):
    """A model on this disk: its commit, and what its page says (licence, whether it is gated or private)."""

    folder: Path
    commit: str
    facts: Mapping[str, Any]


def download(model: str, revision: str | None, check: Callable[[Path], object]) -> Fetched:
    """Fetch a model of the Hub, unless it is in the cache.

    check: called with a folder that holds config.json alone, before any weights are fetched.
    Raises SourceError for a repository that is missing, gated, private, without safetensors, cut short or
    unreachable, ResourceError where the disk is too small, and what `check` raises.
    """
    from httpx2 import TransportError
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers asks a Space to convert pickles
    with understood(model, revision):
        if constants.HF_HUB_OFFLINE:
            return _cached(model, revision)
        try:
            seen = look(model, revision)
        except (TransportError, ConnectionError, TimeoutError) as error:  # no connection: perhaps it is in the cache
            try:
                return _cached(model, revision)
            except OSError:
                raise error from None
        check(Path(hf_hub_download(model, "config.json", revision=seen.commit)).parent)
        read_headers(seen)
        wanted = [*map(escape, seen.weights), *TEXTS]
        coming = snapshot_download(model, revision=seen.commit, allow_patterns=wanted, dry_run=True)
        _check_disk(model, sum(file.file_size or 0 for file in coming if file.will_download), constants.HF_HUB_CACHE)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        if folder.name != seen.commit:  # the branch moved meanwhile: what was looked at is what is fetched
            folder = Path(snapshot_download(model, revision=seen.commit, allow_patterns=wanted))
    return Fetched(folder, folder.name, facts(seen.info))


def terms(card: Mapping[str, Any]) -> dict[str, str]:
    """The licence that a card's metadata names."""
    return {key: card[key] for key in TERMS if isinstance(card.get(key), str)}


def _cached(model: str, revision: str | None) -> Fetched:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *TEXTS]
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=True))
    return Fetched(folder, folder.name, {})


def _check_disk(model: str, needed: int, cache: str) -> None:
    folder = next(path for path in (Path(cache), *Path(cache).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed + MARGIN > free and needed:
        raise ResourceError(
            f"{model} takes {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free on the disk of {cache}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )


def facts(info: "ModelInfo") -> dict[str, Any]:
    """Licence, gate and privacy, as the page says them."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    return {**terms(card), "gated": info.gated or False, "private": bool(info.private)}


@contextmanager
def understood(model: str, revision: str | None) -> Iterator[None]:
    """Within: the client's errors as ours, each with its own way out."""
    from httpx2 import TransportError
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"`{model}` is neither a folder nor a Hub id", "a Hub id looks like `org/name`") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated", "accept its terms on its Hub page, then log in with `hf auth login`"
        ) from error
    except DisabledRepoError as error:
        raise SourceError(f"{model} was closed by the Hub", "take another model") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision `{revision}`", "give a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{model} is not on the Hub, or private",
            "check the spelling; log in with `hf auth login` if it is yours",
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, TransportError, OSError) as error:
        raise SourceError(
            f"{model} is not a local folder and the Hub cannot be reached: {str(error).strip().splitlines()[0]}",
            "give the path of a model folder, or check the connection",
        ) from error
