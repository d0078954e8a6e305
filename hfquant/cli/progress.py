"""Progress of a compression on stderr: a bar on a terminal, a line per block in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ..measure.tally import Finished
from ..measure.tally import Tally as Count
from .units import duration


class Tally(Count):
    """The count in words."""

    def __str__(self) -> str:
        """`block 3/30  error 0.0341  left 1 min 20 s`"""
        if self.last is None:
            return "preparing"
        said = [f"block {min(self.last.block + 1, self.last.blocks)}/{self.last.blocks}"]
        if self.last.error is not None:
            said.append(f"error {self.last.error:.3g}")
        if self.eta is not None:
            said.append(f"left {duration(self.eta)}")
        return "  ".join(said)


@contextmanager
def progress(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    """Show `tally` while the context lasts; call the result with every finished layer."""
    with _bar(tally, console) if console.is_terminal else _lines(tally, console) as show:
        yield show


@contextmanager
def _bar(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compressing", total=tally.weights, completed=tally.weights_done, said=str(tally))

        def show(layer: Finished) -> None:
            tally.add(layer)
            name = layer.name if len(layer.name) <= 48 else f"...{layer.name[-45:]}"
            bar.update(task, completed=tally.weights_done, said=f"{tally}  {name}")

        yield show


@contextmanager
def _lines(tally: Tally, console: Console) -> Iterator[Callable[[Finished], None]]:
    line = ""

    def show(layer: Finished) -> None:
        nonlocal line
        if tally.add(layer):
            console.print(line)
        share = tally.weights_done / max(1, tally.weights)
        line = f"{share:4.0%}  {tally}  ({tally.done} of {tally.layers} layers, {duration(tally.elapsed)})"

    yield show
    if line:
        console.print(line)


@contextmanager
def looking(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how many blocks have been looked at; call the result with (done, all) after each."""
    said = "looking at what every layer costs on every grid"
    if not console.is_terminal:
        console.print(said)
        yield lambda done, of: None
        return
    with Progress(TextColumn(said), BarColumn(), TaskProgressColumn(), console=console, transient=True) as bar:
        task = bar.add_task("looking", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
