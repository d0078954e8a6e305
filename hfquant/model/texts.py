"""The texts that come with hfquant, so that a first run needs no download.  All are in the public domain.

calibration  "The Adventures of Sherlock Holmes" (Arthur Conan Doyle, 1892), 575 kB
evaluation   passages of "The Wonderful Wizard of Oz" (L. Frank Baum, 1900), "Alice's Adventures in
             Wonderland" (Lewis Carroll, 1865), "Dracula" (Bram Stoker, 1897) and "The Count of Monte Cristo"
             (Alexandre Dumas, the English translation of 1846), 240 kB

No work is in both: what a model is measured on was never looked at while it was compressed.
"""

import gzip
from importlib.resources import files

NAMES = ("calibration", "evaluation")


def packaged(name: str) -> str:
    """The text of that name, one of NAMES.  Raises KeyError for any other."""
    if name not in NAMES:
        raise KeyError(f"no packaged text `{name}`: there are {', '.join(NAMES)}")
    return gzip.decompress((files("hfquant.model") / "data" / f"{name}.txt.gz").read_bytes()).decode()
