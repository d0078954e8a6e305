"""What is shown: everything that is not ours stands in code spans, and nothing is counted twice."""

import re
from typing import Any

import pytest

from hfquant.conversion.facts import Preview, Problem
from hfquant.conversion.job import LOCAL_STEPS, Event, Failure, Job, Progress, Pushed, Step
from hfquant.errors import HfquantError
from space_app import jobs, plots, views

EVIL = "`x` <img src=x onerror=alert(1)> [y](javascript:alert(1)) | z"


def job(**changes: Any) -> Job:
    steps = tuple(Step(name, "waiting") for name in LOCAL_STEPS)
    known: dict[str, Any] = {
        "id": "1", "user": "alice", "state": "failed", "request": {"model": EVIL, "recipe": {"name": EVIL}}, "key": "k",
        "revision": None, "attempt": 1, "created": 0.0, "started": None, "finished": None, "steps": steps,
        "progress": Progress(),
    }  # fmt: skip
    return Job(**(known | changes))


def outside(text: str) -> str:
    """What of a Markdown text is not within a code span."""
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


@pytest.mark.parametrize(
    "text",
    [
        views.headline(job(failure=Failure("Bug", EVIL, EVIL))),
        views.headline(job(state="done", pushed=Pushed(EVIL, "https://hub.example/a/b", EVIL))),
        views.failure(HfquantError(EVIL, EVIL)),
        views.history([job()], {}),
        views.problems([Problem("license", EVIL, EVIL)]),
        views.preview(
            Preview(None, None, EVIL, False, True, EVIL, 4.0, 2, 1, 1, 1, (1.0, 2.0), 0.0, (), (Problem("x", EVIL),))
        ),
    ],
)  # fmt: skip
def test_nothing_foreign_is_obeyed(text: str) -> None:
    assert "onerror" in text, "it is shown"
    assert not any(word in outside(text) for word in ("onerror", "javascript", "<img"))
    assert all(row.count("|") == 7 for row in text.splitlines() if row.startswith("| 1970"))


def test_the_stepper_is_html_of_our_own_words() -> None:
    assert "img" not in views.stepper(job(progress=Progress(layers=3, layers_done=1)))


def test_a_step_in_which_a_job_was_cancelled_does_not_run_any_more() -> None:
    steps = (Step("download", "done", 2.0), Step("compress", "running"), Step("push", "waiting"))
    running, stopped = (views.stepper(job(state=state, steps=steps)) for state in ("running", "cancelled"))
    assert 'aria-current="step"' in running
    assert '<span class="sr"> running</span>' in running
    assert "aria-current" not in stopped
    assert '<span class="sr"> stopped</span>' in stopped
    assert '<span class="sr"> running</span>' not in stopped


def test_what_is_compressed_is_not_said_to_lack_a_block_nor_to_take_no_time() -> None:
    done = Progress(share=1.0, layers_done=21, layers=21, blocks_done=2, blocks=3, eta=0.2)
    assert "21 of 21 layers, 3 of 3 blocks" in views.stepper(job(state="running", progress=done))
    assert "left" not in views.headline(job(state="running", progress=done))
    half = Progress(share=0.5, layers_done=10, layers=21, blocks_done=1, blocks=3, eta=8.0)
    assert "10 of 21 layers, 1 of 3 blocks" in views.stepper(job(state="running", progress=half))
    assert "about 8 s left" in views.headline(job(state="running", progress=half))


def test_a_layer_that_is_told_again_is_one_layer() -> None:
    told = [Event(n, 0.0, "layer", {"name": name, "error": n / 10}) for n, name in enumerate("aba", 1)]
    seen = jobs._after(jobs.NOTHING, told)
    assert seen["layers"] == {"a": 0.3, "b": 0.2}
    assert seen["number"] == 3
    assert jobs.NOTHING["layers"] == {}


def test_no_point_of_the_plot_of_results_is_cut_by_its_edge() -> None:
    for values in ([1.015, 1.028], [0.14, 0.14], [0.3, 250.0, 4.0]):
        least, most = plots.around(values)
        assert least < min(values) < max(values) + 1e-12 < most
        assert most - least < 1.3 * (max(values) - min(values)) + 0.1 * max(values)
    report = {"evaluation": {"reference_perplexity": 10.0, "perplexity": 11.0}, "output": {"bytes": 5_000_000}}
    found = [job(id=n, state="done") for n in "12"]
    drawn = plots.of_results(found, dict.fromkeys("12", report))
    assert drawn["compared"]["y_lim"] == pytest.approx([1.078, 1.122])
    assert "compared" not in plots.of_results(found[:1], {"1": report}), "one alone is not compared"
    assert "compared" not in plots.of_results([], {})


def test_a_card_shows_its_own_figures_and_fetches_nothing() -> None:
    own = {"figures/bits.png": "data:image/png;base64,AAAA"}
    text = """---
license: mit
---
# A model
![bits of each layer](figures/bits.png)
![not kept](figures/rows.png)
![x](https://evil.example/a.png)
words ![y](https://evil.example/b.png) and <img src="https://evil.example/c.png"> <IMG/src=x onerror=alert(1)>
![figures/bits.png](figures/../../secret.png)
<details>
<summary>More</summary>
a < b, and more!
</details>
"""
    shown = views.card(text, own)
    assert "![bits of each layer](data:image/png;base64,AAAA)" in shown
    assert shown.count("![") == 1
    assert "<img" not in shown.lower()
    assert "rows.png" not in shown
    assert "<details>\n<summary>More</summary>\na < b, and more!\n</details>" in shown
    assert "![" not in views.card(text)
    assert "license: mit" in shown
