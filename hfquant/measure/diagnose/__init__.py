"""Why a model is hard to compress, and what compressing did to it: measured, kept as JSON, and drawn.

The figures are those that the literature argues with: embeddings that collapse (QuantGPT), ranges that differ from
token to token and from row to row (ZeroQuant), outlying channels before and after smoothing (SmoothQuant), weights that
are not normal; and of a result its errors, bits and bytes along the depth, and size against accuracy.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__, report
from ...errors import CheckpointError
from ...model.calibration import digest, token_batches
from ...model.skeleton import Skeleton
from ...runtime.offload.opening import open_model
from ...tensors.shards import write_text
from ..figures import Figure, draw
from ..original import opened
from . import result
from .embeddings import compared
from .walk import Seen, walk

SCHEMA = 1
FILE = "diagnosis.json"
FOLDER = "figures"


def diagnose(
    model: str | Path,
    out: str | Path | None = None,
    *,
    against: str | Path | None = None,
    beside: Sequence[str | Path] = (),
    text: str = "default",
    samples: int = 8,
    seq_len: int = 256,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    look: bool = True,
) -> dict[str, Any]:
    """Measure a model, dense or compressed, and draw the figures -> what is in diagnosis.json.

    out: where figures and data go; by default `figures` in a compressed model's folder, where its report and card take
    notice of them.  against: a compressed model's original, by default the one its report names.  beside: other results
    of the same original, for the figure of size and accuracy.  text, samples, seq_len, seed: what is read, as in
    calibration.  look: False draws what the report alone tells, without opening the model.

    Raises CheckpointError without `out` for a model that is not compressed, and what reading models and texts raises.
    """
    folder = Path(model)
    known = report.read(folder) if (folder / report.FILE).is_file() else {}
    home = out is None
    if out is None:
        if not known.get("wire"):
            raise CheckpointError(f"`{model}` is not the folder of a compressed model", "say where to: `--out DIR`")
        out = folder / FOLDER
    out = Path(out)
    data: dict[str, Any] = {"schema": SCHEMA, "hfquant": __version__}
    if known.get("wire"):
        data["layers"] = result.layers(known)
        data["stored"] = {"before": (known.get("source") or {}).get("bytes"), "after": known["output"]["bytes"]}
        if beside:
            data["frontier"] = result.frontier([folder, *map(Path, beside)])
    if look:
        settings = {"samples": samples, "seq_len": seq_len, "seed": seed}
        data |= _look(model, known, against, text, settings, dtype)
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(data, out)
    data["figures"] = [vars(figure) for figure in figures]
    data = report.plain(data)
    write_text(out / FILE, json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
    if home:
        _note(folder, figures)
    return data


def _look(
    model: str | Path,
    known: Mapping[str, Any],
    against: str | Path | None,
    text: str,
    settings: Mapping[str, int],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Walk through the model, and through its original if it is compressed."""
    source = known.get("source") or {}
    original = against if against is not None else source.get("id") if known.get("wire") else None
    revision = None if against is not None else source.get("revision")
    with opened(original, revision) as found:
        names = {"model": model} if found is None else {"original": found.path, "compressed": model}
        seen: dict[str, Seen] = {}
        tokens = None
        for name, where in names.items():
            with opened_skeleton(where, dtype) as skeleton, tempfile.TemporaryDirectory(prefix="hfquant-") as states:
                if tokens is None:
                    tokenizer = None if text.endswith(".npy") else skeleton.source.tokenizer()
                    tokens = token_batches(text, tokenizer, **settings)
                    dtype = skeleton.dtype
                seen[name] = walk(skeleton, tokens, Path(states))
    assert tokens is not None
    return {"settings": _settings(text, settings, tokens, dtype), **_told(seen)}


@contextmanager
def opened_skeleton(model: str | Path, dtype: torch.dtype | None) -> Iterator[Skeleton]:
    """A model, dense or compressed, ready to be read block by block."""
    if Path(model).suffix != ".gguf":
        yield open_model(model, dtype)
        return
    with opened(model) as source:
        assert source is not None
        yield open_model(source.path, dtype)


def _settings(text: str, settings: Mapping[str, int], tokens: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    name = "hfquant calibration" if text == "default" else Path(text).name
    return {"text": name, **settings, "sha256": digest(tokens), "dtype": str(dtype).removeprefix("torch.")}


def _told(seen: Mapping[str, Seen]) -> dict[str, Any]:
    return {
        "embeddings": compared({name: one.tables for name, one in seen.items()}),
        "weights": {name: one.weights for name, one in seen.items()},
        "inputs": {name: one.inputs for name, one in seen.items()},
        "histograms": {
            name: [
                {"stack": stack, "role": role, "counts": counts.tolist()}
                for (stack, role), counts in one.histograms.items()
            ]
            for name, one in seen.items()
        },
    }


def _note(folder: Path, figures: Sequence[Figure]) -> None:
    """Have report and card of a compressed model know its figures."""
    from .. import card

    listed = [{**vars(figure), "file": f"{FOLDER}/{figure.file}"} for figure in figures]
    card.write(folder, report.merge(folder, figures={"data": f"{FOLDER}/{FILE}", "files": listed}))
