"""The texts that come with hfquant, so that a first run needs no download.

calibration  630 kB    evaluation  300 kB

Each is of three kinds, passage by passage in turn: novels, articles of an encyclopedia, and technical English with
code.  What a model is calibrated on decides which errors are avoided; a text of one kind is paid for on all others
(docs/evaluate.md).  No work, article or file is in both: what a model is measured on was never looked at while it was
compressed.  Where they are from, and under which licence each kind is: data/LICENSES.md.
"""

import gzip
from importlib.resources import files

NAMES = ("calibration", "evaluation")
KINDS = ("novels", "encyclopedia", "code")
END = "\f"  # of a passage, in the files


def packaged(name: str) -> str:
    """The text of that name, one of NAMES.  Raises KeyError for any other."""
    if name not in NAMES:
        raise KeyError(f"no packaged text `{name}`: there are {', '.join(NAMES)}")
    placed: list[tuple[float, str]] = []
    for kind in KINDS:
        passages = of_kind(name, kind)
        placed += [((i + 0.5) / len(passages), passage) for i, passage in enumerate(passages)]
    return "\n\n".join(passage for _, passage in sorted(placed, key=lambda one: one[0])) + "\n"


def of_kind(name: str, kind: str) -> list[str]:
    """Its passages of one of KINDS."""
    raw = (files("hfquant.model") / "data" / f"{name}_{kind}.txt.gz").read_bytes()
    return gzip.decompress(raw).decode().split(END)
