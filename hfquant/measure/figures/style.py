"""How all figures look: one size of page, one set of markers and hatches, text that can be read at card width."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

WIDTH, DPI = 7.0, 160  # inches, and dots in one: 1120 pixels, shown on a card as about 700
PANEL = 2.0  # inches of height of one of several panels
MOST = 8  # panels in a figure
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("///", "...", "xxx", "\\\\\\", "ooo", "+++", "|||", "---")
DASHES = ("-", "--", ":", "-.")
INKS = ("#1b4f8f", "#c2571a", "#2e7d4f", "#8b3a8b", "#555555", "#b8860b", "#0f7f8c", "#a12c3a")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # names of layers are not formulas
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure in memory, its title, and what it shows in words."""

    figure: Figure
    title: str
    alt: str

    def save(self, path: Path) -> None:
        """The same data gives the same bytes."""
        with mpl.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            drawn = BytesIO()
            self.figure.savefig(drawn, dpi=DPI, format="png")
        with Image.open(drawn) as image:  # a third of the bytes: few colours are used
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, "png", optimize=True)


@contextmanager
def page(title: str, height: float) -> Iterator[Figure]:
    """An empty figure of full width, with a title."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.suptitle(title, fontsize=11, fontweight="bold")
        yield figure


def grid(figure: Figure, count: int, columns: int = 2, **options: Any) -> list[Axes]:
    """`count` panels in rows of `columns`."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    for axis in axes[max(0, count - columns) : count]:  # the panel above an unused one has labels of its own
        axis.tick_params(labelbottom=True)
    return axes[:count]


def height(count: int, columns: int = 2, each: float = PANEL) -> float:
    """Inches that a page with so many panels needs."""
    return 1.2 + each * math.ceil(count / min(columns, count))


def depth(axis: Axes, blocks: Sequence[int]) -> None:
    """The x axis counts blocks."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axis.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)


def band(axis: Axes, blocks: Sequence[int], low: Sequence[float], high: Sequence[float], label: str) -> None:
    """What most of many values lie between."""
    axis.fill_between(
        blocks, low, high, facecolor="#e4e8ee", edgecolor="#8899aa", hatch="///", linewidth=0, label=label
    )


def logarithmic(axis: Axes) -> None:
    """The y axis is logarithmic, with a handful of ticks that are numbers that people read."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.5:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        return
    leads = (1, 1.5, 2, 3, 5, 7) if decades < 1.1 else (1, 2, 5) if decades < 2.2 else (1,)
    step = max(1, round(decades / 5))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [lead * 10.0**power for power in powers if power % step == 0 for lead in leads]
    axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def below(axes: Sequence[Axes], label: str, columns: int = 2) -> None:
    """What the x axis is, said once below every column of panels."""
    for axis in axes[-min(columns, len(axes)) :]:
        axis.set_xlabel(label)


def legend(figure: Figure, axis: Axes, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)


def said(value: float) -> str:
    """A number in a sentence: three digits, no exponent where people would write none."""
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:.3g}"


def shorten(text: str, most: int = 34) -> str:
    """A name that fits above a panel, of characters that the font has."""
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return shown if len(shown) <= most else "…" + shown[-most + 1 :]


def leaves(roles: Sequence[str]) -> str:
    """The last parts of module names, as few of them as there are: q_proj, k_proj, v_proj."""
    names = list(dict.fromkeys(role.rpartition(".")[2] for role in roles))
    return shorten(", ".join(names))
