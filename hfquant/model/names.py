"""Names of files in a repository, which anybody may choose: only those are fetched that mean one file anywhere."""

import unicodedata
from collections.abc import Iterable

LONGEST = 200  # bytes of one part: the client adds to it, and file systems take 255
DEEPEST = 800  # bytes of a whole name
ELSEWHERE = set('\\:*?"<>|')  # that Windows takes for something else, or not at all
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}


def objection(names: Iterable[str]) -> str | None:
    """What is wrong with files of these names in one folder, in words; None if nothing is."""
    seen: dict[str, str] = {}
    for name in names:
        if (said := _objection(name)) is not None:
            return f"it has a file called {name[:80]!r}, {said}"
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            return f"its files {seen[folded][:80]!r} and {name[:80]!r} are one on many disks"
        seen[folded] = name
    for folded, name in seen.items():
        if any(folded[:at] in seen for at, character in enumerate(folded) if character == "/"):
            return f"its file {name[:80]!r} lies in another file"
    return None


def _objection(name: str) -> str | None:
    parts = name.split("/")
    if "\\" in name or "" in parts or ".." in parts or "." in parts:
        return "which leads elsewhere"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in name):
        return "which has characters that cannot be seen"
    if ELSEWHERE & set(name) or any(part.partition(".")[0].lower() in DEVICES for part in parts):
        return "which is no file's name on every system"
    if any(len(part.encode()) > LONGEST for part in parts) or len(name.encode()) > DEEPEST:
        return "which is too long"
    if parts[0] == ".cache":
        return "which the client keeps for itself"
    return None
