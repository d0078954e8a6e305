"""Fetching a job's original into the job's own folder: exactly the files that are needed, their hashes checked."""

import fnmatch
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils.tqdm import tqdm

from ..errors import HubError, SourceError
from ..model.hub import TEXTS
from ..model.names import objection
from ..model.remote import Look, Token
from .artefact import PIECE
from .retry import patiently

MAX_TEXT = 200_000_000  # bytes of a file that is not weights
MAX_TEXTS = 500
Guard = Callable[[], None]  # raises when the work is not wanted any more


def wanted(seen: Look) -> list[str]:
    """The files that a conversion needs: weights, config, tokenizer, licence.  Never code, never pickles.

    Raises SourceError where one of them could become a file elsewhere, or two of them one file.
    """
    texts = [name for name in seen.files if any(fnmatch.fnmatch(name, pattern) for pattern in TEXTS)]
    if len(texts) > MAX_TEXTS or any(seen.files[name] > MAX_TEXT for name in texts):
        raise SourceError(
            f"{seen.model} holds more beside its weights than a model needs", "take another copy of the model"
        )
    found = [*seen.weights, *(name for name in sorted(texts) if name not in seen.weights)]
    if said := objection(found):
        raise SourceError(f"{seen.model} cannot be fetched: {said}", "take another copy of the model")
    return found


def pull(seen: Look, folder: Path, token: Token, guard: Guard, tell: Callable[[str], None]) -> int:
    """Fetch what is not there yet -> bytes of all of it.

    Raises HubError or SourceError, and what `guard` raises: it is asked while bytes come in.
    """
    hashes = {file.rfilename: file.lfs.sha256 for file in seen.info.siblings or () if file.lfs}
    total = 0
    for name in wanted(seen):
        guard()
        target = folder / name
        if not _is_whole(target, seen.files[name], hashes.get(name)):
            tell(f"fetching {name}, {seen.files[name] / 1e6:,.1f} MB")
            patiently(lambda name=name: _fetch(seen, name, folder, token, guard))  # type: ignore[misc]
            if not _is_whole(target, seen.files[name], hashes.get(name)):
                target.unlink(missing_ok=True)
                raise HubError(f"{name} of {seen.model} arrived with another content", "resume the job to try again")
        total += seen.files[name]
    return total


def _fetch(seen: Look, name: str, folder: Path, token: Token, guard: Guard) -> None:
    class Guarded(tqdm):  # the client offers no other way to look in while it fetches
        def update(self, n: float | None = 1) -> Any:
            guard()
            return super().update(n)

    hf_hub_download(seen.model, name, revision=seen.commit, local_dir=folder, token=token, tqdm_class=Guarded)


def _is_whole(file: Path, size: int, sha256: str | None) -> bool:
    if not file.is_file() or file.is_symlink() or file.stat().st_size != size:
        return False
    return sha256 is None or _sha256(file) == sha256


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(PIECE):
            yield piece
