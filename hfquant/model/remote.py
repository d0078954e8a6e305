"""A model on the Hub, looked at: what its page says, what the headers of its files promise; no weight is fetched."""

import json
import math
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import LimitError, SourceError
from .bounds import MAX_CHARACTERS, check_config
from .headers import DTYPES

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Token = str | bool | None  # as huggingface_hub has it: None is the login of this machine, False nobody's

FIRST = 100_000  # bytes of a file that are asked for at once: most headers are shorter
LONGEST = 50_000_000  # bytes of a header
MAX_SHARDS = 1_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
OTHER_COPY = "take another copy, or another revision"
LATER = "try again later"
SILENCE = 60.0  # seconds between two pieces of an answer; the client itself would wait for ever

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (type, shape), as the headers have them


@dataclass(frozen=True)
class Look:
    """A repository at one commit.  files: its files with their sizes; weights: those that hold the model."""

    model: str
    commit: str
    info: "ModelInfo" = field(repr=False)
    files: Mapping[str, int]
    weights: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(self.files[name] for name in self.weights)


def look(model: str, revision: str | None, token: Token = None) -> Look:
    """Raises SourceError for a repository without a model in safetensors, and what huggingface_hub raises."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(model, revision=revision, files_metadata=True)
    if not info.sha:
        raise SourceError(f"{model} has no commit", "give a repository that has files")
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Look(model, info.sha, info, files, tuple(_weights(model, files)))


def _weights(model: str, names: Mapping[str, int]) -> list[str]:
    """The safetensors files that hold the model; some repositories hold the weights a second time."""
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
        found = shards or found
    elif WHOLE in names:
        found = [WHOLE]
    if len(found) > MAX_SHARDS:
        raise SourceError(f"{model} has {len(found):,} files of weights", f"at most {MAX_SHARDS:,} can be read")
    return found


def read_config(seen: Look, token: Token = None) -> dict[str, Any]:
    """config.json, its numbers checked.  Raises SourceError."""
    if seen.files["config.json"] > MAX_CHARACTERS:
        raise SourceError(f"config.json of {seen.model} has {seen.files['config.json']:,} bytes", OTHER_COPY)
    try:
        raw = json.loads(_get(seen, "config.json", token))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"config.json of {seen.model} is not JSON: {error}", OTHER_COPY) from error
    check_config(raw, seen.model)
    return dict(raw)


def read_headers(seen: Look, token: Token = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What every file says it holds, compared with its size on the Hub.  Raises SourceError where it cannot be so."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    with ThreadPoolExecutor(8) as pool:
        for tensors in pool.map(lambda name: dict(_tensors(seen, name, token)), seen.weights):
            found |= tensors
    return found


def read_tensors(
    seen: Look, names: Collection[str], token: Token = None, *, most: int, until: float = math.inf
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Some tensors, each by a range of its file -> name: (type, shape, its bytes).  None that is nowhere, or empty.

    A name that several files have is taken from the first.  most: bytes of all of them together.  until: by
    `time.monotonic()`, when they have to be here.

    Raises SourceError for a file whose header cannot be, or that the Hub did not deliver in parts or in time, and
    LimitError before more than `most` is asked for.
    """
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    total = 0
    for file in seen.weights:
        if len(found) == len(names):
            break
        for name, (kind, shape, begin, end) in _entries(seen, file, token, until):
            if name not in names or name in found or begin == end:
                continue
            total += end - begin
            if total > most:
                said = f"{total / 1e6:,.0f} MB of {seen.model} are asked for, at most {most / 1e6:,.0f} are fetched"
                raise LimitError(said, OTHER_COPY)
            content = _get(seen, file, token, begin, end - begin, until)
            if len(content) != end - begin:
                raise _torn(seen, file)
            found[name] = kind, shape, content
    return found


def _tensors(seen: Look, name: str, token: Token) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for tensor, (kind, shape, _, _) in _entries(seen, name, token):
        yield tensor, (kind, shape)


def _entries(
    seen: Look, name: str, token: Token, until: float = math.inf
) -> list[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Each tensor of a file: (type, shape, where its bytes begin and end in the file)."""
    size, start = seen.files[name], _get(seen, name, token, 0, FIRST, until)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > min(size, LONGEST):
        raise SourceError(f"{name} of {seen.model} is damaged: its header cannot be read", OTHER_COPY)
    if len(start) < 8 + length:
        start = _get(seen, name, token, 0, 8 + length, until)
    found, last = [], 0
    try:
        header = json.loads(start[8 : 8 + length])
        header.pop("__metadata__", None)
        for tensor, entry in header.items():
            kind, shape, begin, end = _entry(entry)
            last = max(last, end)
            found.append((tensor, (kind, shape, 8 + length + begin, 8 + length + end)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{name} of {seen.model} is damaged: its header cannot be read", OTHER_COPY) from error
    if 8 + length + last != size:
        raise SourceError(
            f"{name} of {seen.model} is damaged: {8 + length + last:,} bytes are promised, the file has {size:,}",
            OTHER_COPY,
        )
    return found


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, begin, end) of a header's entry.

    Raises ValueError, KeyError or TypeError for what cannot be: who counts by the shape has to fetch no more than that.
    """
    (begin, end), kind, shape = entry["data_offsets"], str(entry["dtype"]), tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)) or end < begin:
        raise ValueError(f"{begin} to {end} for {shape}")
    # of types that torch does not have, such as those of less than a byte, the size is not known
    if kind in DTYPES and end - begin != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{end - begin} bytes for {shape} of {kind}")
    return kind, shape, begin, end


def _torn(seen: Look, name: str) -> SourceError:
    return SourceError(f"{name} of {seen.model} did not arrive in the part that was asked for", LATER)


def _get(
    seen: Look, name: str, token: Token, start: int | None = None, count: int = MAX_CHARACTERS, until: float = math.inf
) -> bytes:
    """A small file, or `count` bytes of a large one; fewer where it ends.

    Never more is read: of a server that ignores ranges the start of a file is taken, and nothing else.
    Raises SourceError for another part than was asked for, or one that is not here by `until`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = build_hf_headers(token=token)
    if start is not None:  # as it is stored: what is compressed on the way could be longer than what was counted
        headers |= {"range": f"bytes={start}-{start + count - 1}", "accept-encoding": "identity"}
    url = hf_hub_url(seen.model, name, revision=seen.commit)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=SILENCE) as answer:
        if answer.is_error:
            answer.read()  # what the client's errors quote
        hf_raise_for_status(answer)
        if start and answer.status_code != 206:
            raise _torn(seen, name)
        parts, arrived = [], 0
        for part in answer.iter_bytes(1 << 20):
            parts.append(part)
            arrived += len(part)
            if arrived >= count:
                break
            if time.monotonic() > until:
                raise SourceError(f"{name} of {seen.model} did not arrive in time", LATER)
    if arrived > count and (start is None or answer.status_code == 206):
        raise _torn(seen, name)
    return b"".join(parts)[:count]
