"""Figures of a diagnosis, drawn from its data alone.

They are made for a card's width of about 700 pixels, and to be read without colour: lines differ in marker and dash,
areas in hatching.  Each comes with a text that says what it shows, in numbers, for those who cannot see it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .style import Drawing

About = Literal["result", "model"]


@dataclass(frozen=True)
class Figure:
    """A file in the folder of figures.  alt: what it shows, in words of hfquant's own.  about: the compressed model,
    or what makes the original hard to compress."""

    file: str
    title: str
    alt: str
    about: About


def draw(data: Mapping[str, Any], folder: Path) -> list[Figure]:
    """Draw all that a diagnosis has data for into a folder; figures of an earlier one are replaced or removed."""
    from . import clipping, embeddings, inputs, result, weights

    makers: dict[str, tuple[About, Callable[[Mapping[str, Any]], Drawing | None]]] = {
        "frontier": ("result", result.frontier),
        "layer-error": ("result", result.errors),
        "bits": ("result", result.bits),
        "clipping": ("result", clipping.clipping),
        "embeddings": ("result" if "layers" in data else "model", embeddings.embeddings),
        "channels": ("model", inputs.channels),
        "tokens": ("model", inputs.tokens),
        "rows": ("model", weights.rows),
        "weights": ("model", weights.distributions),
    }
    found = []
    for name, (about, make) in makers.items():
        path = folder / f"{name}.png"
        drawing = make(data)
        if drawing is None:
            path.unlink(missing_ok=True)
            continue
        drawing.save(path)
        found.append(Figure(path.name, drawing.title, drawing.alt, about))
    return found
