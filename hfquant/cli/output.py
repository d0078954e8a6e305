"""What is printed, and where: data on stdout, the rest on stderr, plain text where it is not a terminal."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def data() -> Console:
    """stdout.  Piped output is never wrapped or cut to a width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def log() -> Console:
    """stderr"""
    return Console(stderr=True, highlight=False, soft_wrap=True)


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


def print_facts(console: Console, facts: Mapping[str, str | None], title: str | None = None) -> None:
    """Names and values in two columns; a value of None is left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, Text(value))
    if title:
        console.print(Text(title, "bold"))
    console.print(table, soft_wrap=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on stdout; `right` names the columns whose values are numbers."""
    console = data()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
