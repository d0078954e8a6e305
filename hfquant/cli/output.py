"""What is printed, and where: data on stdout, the rest on stderr, plain text where it is not a terminal."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
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
    """A table on stdout; `right` names the columns whose values are numbers."""
    console = data()
    if not console.is_terminal:
        _print_plain([columns, *rows], [column in right for column in columns])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_plain(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """Columns padded with spaces, for files and pipes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, right, strict=True)
        print("  ".join(cell.rjust(w) if number else cell.ljust(w) for cell, w, number in cells).rstrip())
