"""The error after each step: from the layers' rows, by the way they went."""

from markdown_it import MarkdownIt

from hfquant.measure import card
from hfquant.measure.trail import StepError, step_errors
from tests.measure.test_card import full


def row(name: str, *trail: tuple[str, float | None]) -> dict[str, object]:
    return {"name": name, "error": trail[-1][1], "trail": [list(step) for step in trail]}


def test_means_per_step_and_way() -> None:
    found = step_errors(
        {
            "layers": [
                row("a", ("rtn", 0.2), ("lorc", 0.1)),
                row("b", ("rtn", 0.4), ("lorc", 0.2)),
                row("experts", ("rtn", 0.3)),
                row("c", ("sparsegpt", 0.1), ("gptq", None), ("lorc", 0.05)),
                {"name": "older", "error": 0.1},
            ]
        }
    )
    assert found[:2] == [StepError("rtn", 2, (0.2 + 0.4) / 2), StepError("rtn + lorc", 2, (0.1 + 0.2) / 2)]
    assert found[2:] == [
        StepError("sparsegpt", 1, 0.1),
        StepError("sparsegpt + gptq", 1, None),
        StepError("sparsegpt + gptq + lorc", 1, 0.05),
    ]


def test_one_step_tells_nothing_new() -> None:
    assert step_errors({"layers": [row("a", ("rtn", 0.2))]}) == []
    assert step_errors({}) == []
    assert "What each step cost" not in card.render(full())


def test_the_card_has_it_folded() -> None:
    layers = [{**full()["layers"][0], "trail": [["rtn", 0.25], ["lorc", 0.125]]}]
    text = card.render(full(layers=layers))
    assert "<summary>What each step cost</summary>" in text
    assert "| `rtn + lorc` | 1 | 0.125 |" in text
    assert "| `4 bit, groups of 64, symmetric` | `rtn + lorc` |" in text, "the layer's own row"
    tables = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text.split("---\n", 2)[2])
    assert sum(t.type == "table_open" for t in tables) == 4


def test_the_card_does_not_deny_rounded_activations() -> None:
    assert "activations are not" in card.render(full())
    text = card.render(full(recipe={**full()["recipe"], "activations": {"bits": 8, "per": "token"}}))
    assert "activations are not" not in text
    assert "rounded to 8 bit while" in text
