"""Figures of real models, those of the examples, as a card shows them: 700 pixels wide, perhaps without colour."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from hfquant.measure.card import TEMPLATES
from hfquant.measure.figures import embeddings, inputs, result, weights
from hfquant.measure.figures.style import STYLE, WIDTH, Drawing

CARD = 700  # pixels
LEAST = 12  # pixels of height of a letter with all that belongs to it
EXAMPLES = sorted(path.parent for path in TEMPLATES.glob("examples/*/figures/diagnosis.json"))
MAKERS: tuple[Callable[[Any], Drawing | None], ...] = (
    result.frontier, result.errors, result.bits, embeddings.embeddings,
    inputs.channels, inputs.tokens, weights.rows, weights.distributions,
)  # fmt: skip


@pytest.fixture(params=EXAMPLES, ids=lambda folder: folder.parent.name)
def figures(request: pytest.FixtureRequest) -> list[Figure]:
    data = json.loads((request.param / "diagnosis.json").read_text("utf-8"))
    drawn = [drawing.figure for make in MAKERS if (drawing := make(data))]
    assert len(drawn) >= 7
    with mpl.rc_context(STYLE):
        for figure in drawn:
            FigureCanvasAgg(figure).draw()
    return drawn


def texts(figure: Figure) -> Iterator[Text]:
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text.get_window_extent().width:
            yield text


def test_letters_are_large_enough(figures: list[Figure]) -> None:
    for figure in figures:
        sizes = {text.get_text(): text.get_fontsize() * CARD / (72 * WIDTH) for text in texts(figure)}
        assert len(sizes) >= 4
        assert min(sizes.values()) >= LEAST, min(sizes, key=sizes.__getitem__)


def test_no_text_is_cut_off_or_lies_on_another(figures: list[Figure]) -> None:
    for figure in figures:
        boxes = []
        for axis in (axis for axis in figure.axes if axis.axison):
            for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
                shown = [t for t in ticks if t.get_visible() and t.get_text() and _is_inside(axis, t)]
                boxes += [(t.get_text(), t.get_window_extent()) for t in shown]
            boxes += [(t.get_text(), t.get_window_extent()) for t in (axis.title, axis.xaxis.label, axis.yaxis.label)]
        for legend in figure.legends:
            boxes += [(t.get_text(), t.get_window_extent()) for t in legend.get_texts()]
        boxes = [(text, box) for text, box in boxes if text and box.width]
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= figure.bbox.width + 1, text
            assert not [other for other, there in boxes[:i] if box.shrunk(0.9, 0.9).overlaps(there)], text


def _is_inside(axis: Axes, tick: Text) -> bool:
    """matplotlib keeps labels for ticks that are outside of what is shown, and does not draw them."""
    box = tick.get_window_extent()
    around = axis.bbox.padded(2)
    across = around.x0 <= (box.x0 + box.x1) / 2 <= around.x1
    return across or around.y0 <= (box.y0 + box.y1) / 2 <= around.y1


def test_nothing_is_told_by_colour_alone(figures: list[Figure]) -> None:
    for figure in figures:
        for axis in figure.axes:
            lines = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
            looks = [(line.get_marker(), line.get_linestyle()) for line in lines]
            assert len(set(looks)) == len(looks), [line.get_label() for line in lines]
            bars = [(bars.get_label(), bars.patches[0].get_hatch()) for bars in axis.containers]
            assert len({hatch for _, hatch in bars}) == len(bars), bars


def test_inks_are_dark_enough_on_white(figures: list[Figure]) -> None:
    """WCAG's contrast of graphics, 3 to 1; but the curve that is there for orientation."""
    for figure in figures:
        for axis in figure.axes:
            for line in axis.lines:
                if not str(line.get_label()).startswith("_") and line.get_label() != "normal":
                    assert _contrast(line.get_color()) >= 3, line.get_label()


def _contrast(color: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 1.05 / (sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)
