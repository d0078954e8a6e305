"""The examples of cards: of real runs, and what the template of today makes of their reports."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hfquant import report
from hfquant.measure import card
from tests.hub.server import Hub

FOLDER = Path(__file__).parents[2] / "model_cards" / "examples"
EXAMPLES = sorted(path.parent for path in FOLDER.glob("*/README.md"))


def test_there_are_three() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_is_what_its_report_makes(folder: Path) -> None:
    """After a change of the template: `card.write(folder, report.read(folder))` for each of them."""
    known, text = report.read(folder), (folder / card.FILE).read_text("utf-8")
    assert text == card.render(known)
    assert known == report.public(known)
    shown = re.findall(r"!\[[^\]]{40,}\]\((figures/[\w-]+\.png)\)", text)
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in (folder / "figures").glob("*.png"))
    assert len(shown) >= 7
    assert not re.search(r"(?m)(?:^|[\s`(])(?:/|~/)\w", text.replace(" / ", " ")), "a path of some machine"
    assert ModelCard(text).data.to_dict()["model-index"]
    assert known["evaluation"]["reference_perplexity"]
    assert known["evaluation"]["kl"] > 0


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_its_metadata_is_what_the_hub_and_its_client_accept(folder: Path, hub: Hub) -> None:
    shown = ModelCard((folder / card.FILE).read_text("utf-8"))
    shown.validate()
    assert hub.faults.asked("POST", "/validate-yaml"), "the Hub was asked"
    scores = {result.metric_type: result.metric_value for result in shown.data.eval_results or ()}
    evaluation = report.read(folder)["evaluation"]
    assert {metric: evaluation[metric] for metric in card.METRICS} == scores


def test_figures_have_their_numbers_beside_them() -> None:
    for folder in EXAMPLES:
        data = json.loads((folder / "figures" / "diagnosis.json").read_text("utf-8"))
        assert {f"figures/{figure['file']}" for figure in data["figures"]} == {
            figure["file"] for figure in report.read(folder)["figures"]["files"]
        }
