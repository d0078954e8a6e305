"""What is printed, and where: data on stdout, the rest on stderr, plain text where it is not a terminal."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text


def data() -> Console:
    """stdout"""
    return Console(highlight=False)


def log() -> Console:
    """stderr"""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Say what takes a while: with a spinner on a terminal, in a line elsewhere."""
    console = log()
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        console.print(doing)
        yield


def complain(message: str, hint: str | None = None) -> None:
    """`error: ...`, a blank line, `hint: ...`"""
    console = log()
    console.print(Text("error", "bold red"), Text(f": {message}"), sep="")
    if hint:
        console.print()
        console.print(Text("hint", "bold cyan"), Text(f": {hint}"), sep="")


def print_json(document: Any) -> None:
    """One JSON document on stdout.  NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def print_facts(console: Console, facts: Mapping[str, str | None]) -> None:
    """Names and values in two columns; a value of None is left out."""
    known = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, known), default=0)
    for name, value in known.items():
        console.print(Text(name.ljust(width), "cyan"), Text(value), sep="  ", soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Columns on stdout, padded with blanks: for eyes and pipes alike.  `right` names those that hold numbers."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for at, row in enumerate(cells):
        said = (cell.rjust(w) if c in right else cell.ljust(w) for cell, w, c in zip(row, widths, columns, strict=True))
        data().print(Text("  ".join(said).rstrip(), "" if at else "bold"), soft_wrap=True)
