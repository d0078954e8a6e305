"""Figures from data alone: all there, the same bytes again, and readable without seeing them."""

from pathlib import Path
from typing import Any

from PIL import Image

from hfquant.measure.diagnose.result import best, split
from hfquant.measure.diagnose.statistics import BINS, NAMES
from hfquant.measure.figures import draw
from hfquant.measure.figures.series import by_role
from hfquant.measure.figures.style import DPI, WIDTH
from tests.measure.test_card import HOSTILE

EVIL = "$x_{$ [a](b) <b>"


def data(role: str = "mlp.up_proj", blocks: int = 3) -> dict[str, Any]:
    spread = dict(zip(NAMES, (0.1, 0.5, 1.0, 2.0, 9.0), strict=True))
    place = [{"stack": "model.layers", "block": i} for i in range(blocks)]
    shape = {"std": 1.0, "kurtosis": 4.0, "skewness": 0.0, "largest": 12.0, "beyond6": 0.1}
    inputs = [
        p | {"roles": [role], "tokens": spread, "channel_ratio": 40.0, "channel_ratio_smoothed": 3.0} for p in place
    ]
    weights = [p | {"role": role, "attention_output": True, "rows": spread, **shape} for p in place]
    narrowed = [row | {"rows": {**spread, "max": 6.0}} for row in weights]
    layers = [p | {"role": role, "error": 0.1, "bits": 4.5, "bytes_before": 2000, "bytes_after": 600} for p in place]
    return {
        "inputs": {"original": inputs, "compressed": inputs},
        "weights": {"original": weights, "compressed": narrowed},
        "histograms": {"original": [{"stack": "model.layers", "role": role, "counts": [1.0] * BINS}]},
        "embeddings": [
            {"kind": "hidden", "what": "states", "model": m, "cosine": 0.25, "points": [[0, 1], [2, 3], [1, 1]]}
            for m in ("original", "compressed")
        ],
        "layers": layers,
        "stored": {"before": 9000, "after": 3000},
        "frontier": [
            {"name": name, "bytes": size, "perplexity": ppl, "kl": 0.0}
            for name, size, ppl in (("original", 9000, 10.0), ("w4", 3000, 11.0), (role, 4000, 12.0))
        ],
    }


def test_the_same_data_gives_the_same_pictures(tmp_path: Path) -> None:
    assert len(draw(data(), tmp_path)) == 9
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, content in before.items():
        with Image.open(path) as image:
            assert image.width == round(WIDTH * DPI)
        assert len(content) < 200_000
    some = {key: value for key, value in data().items() if key in ("layers", "stored", "embeddings")}
    for figure in draw(some, tmp_path):
        assert (tmp_path / figure.file).read_bytes() == before[tmp_path / figure.file]
    assert len(list(tmp_path.iterdir())) == 3, "those that there is no data for now are gone"


def test_names_of_a_model_stay_in_the_picture(tmp_path: Path) -> None:
    for figure in draw(data(EVIL + "".join(HOSTILE)), tmp_path):
        assert figure.alt.isascii(), figure.alt
        assert not set(figure.alt) & set("[]<>`$\\!"), figure.alt
        assert any(c.isdigit() for c in figure.alt), "it says what is shown, in numbers"


def test_without_data_nothing_is_drawn(tmp_path: Path) -> None:
    assert draw({}, tmp_path) == []


def test_roles_that_end_alike_are_told_apart() -> None:
    rows = [{"stack": "a", "block": 0, "role": role} for role in ("self.q", "cross.q", "mlp.up")]
    assert set(by_role(rows, lambda row: [row["role"]])) == {"self.q", "cross.q", "up"}
    both = [*rows, {"stack": "b", "block": 0, "role": "mlp.up"}]
    assert "b: up" in by_role(both, lambda row: [row["role"]])


def test_the_best_are_those_that_none_beats() -> None:
    rows = [{"bytes": b, "perplexity": p} for b, p in ((9, 10.0), (3, 11.0), (4, 12.0), (3, 13.0), (1, 50.0))]
    assert [row["bytes"] for row in best(rows)] == [1, 3, 9]


def test_names_are_split_at_the_block() -> None:
    assert split("model.layers.12.mlp.experts.3.up") == ("model.layers", 12, "mlp.experts.3.up")
    assert split("lm_head") == ("", None, "lm_head")


def test_clipping_is_drawn_where_there_is_some(tmp_path: Path) -> None:
    (figure,) = (figure for figure in draw(data(), tmp_path) if figure.file == "clipping.png")
    assert "0.67" in figure.alt
    assert figure.about == "result"
    whole = data()
    whole["weights"]["compressed"] = whole["weights"]["original"]
    assert "clipping.png" not in {figure.file for figure in draw(whole, tmp_path)}
    assert not (tmp_path / "clipping.png").exists()
