"""The figures of a job's card, kept beside it: its files are gone when somebody looks at them."""

from collections.abc import Callable, Iterator
from functools import partial

from huggingface_hub import HfApi

from ..measure.card import PICTURE
from .artefact import Artefact
from .retry import patiently
from .verify import Remote, read

MOST = 12
LARGEST = 500_000  # bytes of one
PNG = b"\x89PNG\r\n\x1a\n"


def of_artefact(published: Artefact) -> dict[str, bytes]:
    """Those that are about to be published."""
    return dict(_kept((file.path, file.size, partial(b"".join, file.pieces())) for file in published.files))


def of_repository(api: HfApi, repo: str, there: Remote) -> dict[str, bytes]:
    """Those that another machine pushed."""
    named = ((name, file.size) for name, file in sorted(there.files.items()))
    return dict(
        _kept((name, size, lambda name=name: patiently(lambda: read(api, repo, there.commit, name)))  # type: ignore[misc]
              for name, size in named)
    )  # fmt: skip


def _kept(found: Iterator[tuple[str, int, Callable[[], bytes]]]) -> Iterator[tuple[str, bytes]]:
    """Pictures by name and by what is in them, no more than a page can show."""
    pictures = [(name, content) for name, size, content in found if PICTURE.fullmatch(name) and size <= LARGEST]
    for name, content in pictures[:MOST]:
        if (whole := content()).startswith(PNG):
            yield name, whole
