"""Fetching a model from the Hub: looked at first, then only the files that are needed, never code, never pickles."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ResourceError, SourceError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

TEXTS = ["*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.vocab", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
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
    from huggingface_hub import HfApi, constants, snapshot_download

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers asks a Space to convert pickles
    with _understood(model, revision):
        if constants.HF_HUB_OFFLINE:
            return _cached(model, revision)
        api = HfApi()
        try:
            info = api.model_info(model, revision=revision, files_metadata=True)
        except (TransportError, ConnectionError, TimeoutError) as error:  # no connection: perhaps it is in the cache
            try:
                return _cached(model, revision)
            except OSError:
                raise error from None
        weights = _weights(model, info)
        check(Path(api.hf_hub_download(model, "config.json", revision=info.sha)).parent)
        _check_headers(api, model, info, weights)
        wanted = [*map(escape, weights), *TEXTS]
        coming = snapshot_download(model, revision=info.sha, allow_patterns=wanted, dry_run=True)
        _check_disk(model, sum(file.file_size or 0 for file in coming if file.will_download), constants.HF_HUB_CACHE)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        if folder.name != info.sha:  # the branch moved meanwhile: what was looked at is what is fetched
            folder = Path(snapshot_download(model, revision=info.sha, allow_patterns=wanted))
    return Fetched(folder, folder.name, _facts(info))


def terms(card: Mapping[str, Any]) -> dict[str, str]:
    """The licence that a card's metadata names."""
    return {key: card[key] for key in TERMS if isinstance(card.get(key), str)}


def _cached(model: str, revision: str | None) -> Fetched:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *TEXTS]
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=True))
    return Fetched(folder, folder.name, {})


def _weights(model: str, info: "ModelInfo") -> list[str]:
    """The safetensors files that hold the model; some repositories hold the weights a second time."""
    names = {file.rfilename for file in info.siblings or ()}
    if "config.json" not in names:
        raise SourceError(f"{model} has no config.json", "give a repository in the layout of transformers")
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not found:
        pickled = sorted(name for name in names if name.endswith(PICKLES))
        if pickled:
            raise SourceError(
                f"{model} has only pickled weights ({pickled[0]}), which can run code when they are read",
                "convert them to safetensors where you trust them: load with transformers and `save_pretrained`",
            )
        raise SourceError(f"{model} has no *.safetensors file", "give a repository with a whole model")
    if INDEX in names:
        shards = [name for name in found if name.startswith("model-")]
        return shards or found
    return [WHOLE] if WHOLE in names else found


def _check_headers(api: "HfApi", model: str, info: "ModelInfo", weights: list[str]) -> None:
    """Read what each file says it holds, a few kilobytes of it, and compare with its size on the Hub."""
    from huggingface_hub.errors import SafetensorsParsingError

    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    for name in weights:
        try:
            header = api.parse_safetensors_file_metadata(model, name, revision=info.sha)
        except SafetensorsParsingError as error:
            hint = "take another copy, or another revision"
            raise SourceError(f"{name} of {model} is damaged: its header cannot be read", hint) from error
        data = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
        promised, size = 8 + _header_length(model, name, info.sha) + data, sizes.get(name)
        if size is not None and size != promised:
            raise SourceError(
                f"{name} of {model} is damaged: {promised:,} bytes are promised, the file has {size:,}",
                "take another copy, or another revision",
            )


def _header_length(model: str, name: str, commit: str | None) -> int:
    """The number a safetensors file begins with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "range": "bytes=0-7"}
    answer = get_session().get(hf_hub_url(model, name, revision=commit), headers=headers)
    hf_raise_for_status(answer)
    return int.from_bytes(answer.content[:8], "little")


def _check_disk(model: str, needed: int, cache: str) -> None:
    folder = next(path for path in (Path(cache), *Path(cache).absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed + MARGIN > free and needed:
        raise ResourceError(
            f"{model} takes {needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free on the disk of {cache}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )


def _facts(info: "ModelInfo") -> dict[str, Any]:
    card = info.card_data.to_dict() if info.card_data is not None else {}
    return {**terms(card), "gated": info.gated or False, "private": bool(info.private)}


@contextmanager
def _understood(model: str, revision: str | None) -> Iterator[None]:
    """The client's errors as ours, each with its own way out."""
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
