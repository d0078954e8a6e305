"""Text of unknown origin in a Markdown page: shown as it is, never obeyed.

A model's name, its licence, its layers' names and what it says are not ours.  Here they become code spans and
fenced code, inside which neither Markdown nor HTML means anything.
"""

import re
import unicodedata

from jinja2 import Undefined

from .. import sizes


class Safe(str):
    """Markdown that may be put into a page as it is."""


NOTHING = Safe("–")


def code(text: str) -> Safe:
    """One line of text as a code span that fits into a table cell too."""
    line = " ".join(visible(text).split())
    line = line.replace("|", "¦")  # tables are cut into cells before code spans are looked for
    if not line:
        return Safe("")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Safe(f"{ticks}{pad}{line}{pad}{ticks}")


def fence(text: str, language: str = "text") -> Safe:
    """Any number of lines as a fenced code block, which no line of it can close."""
    body = visible(text).strip("\n")
    ticks = "`" * max(3, _longest_run(body) + 1)
    return Safe(f"{ticks}{language}\n{body}\n{ticks}")


def visible(text: str) -> str:
    """Without control and formatting characters, those that reverse text among them; line ends are \\n."""
    lines = re.sub(r"\r\n?|\x85|\u2028|\u2029", "\n", text)
    return "".join(c for c in lines if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def finalize(value: object) -> object:
    """What Jinja prints for an expression: all text that is not known to be safe becomes a code span."""
    if value is None or isinstance(value, Undefined):
        return NOTHING
    return code(value) if isinstance(value, str) and not isinstance(value, Safe) else value


def size(count: object) -> Safe:
    """Bytes, with three digits and the unit that fits; a dash for none."""
    return Safe(sizes.size(count)) if isinstance(count, int | float) else NOTHING


def number(value: object, form: str = ".4g") -> Safe:
    """A number with so many digits, a dash for none."""
    return Safe(format(value, form)) if isinstance(value, int | float) else NOTHING


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
