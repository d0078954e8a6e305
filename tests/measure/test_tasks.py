"""Tasks from local files: what lm-eval counts is what the model's own probabilities say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.compress import compress
from hfquant.errors import CalibrationError
from hfquant.measure import card
from hfquant.measure.tasks import compared, find, run
from tests.measure.test_card import HOSTILE, full, metadata, outline

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's
pytest.importorskip("lm_eval", reason="an extra: hfquant[eval]")

LINES: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [{"query": "Question: Who?", "choices": ["a lion", "xqzj"], "gold": 0}] * 2
    + [{"query": "Question: What?", "choices": ["qqqq", "the road"], "gold": 0}],
    "piqa_valid": [{"goal": "walk", "sol1": "down the road", "sol2": "zzqx"}, {"goal": "x", "sol1": "y", "sol2": "q"}],
    "hellaswag": [{"ctx": "The girl went", "endings": ["to the house", "jjj", "www", "kkk"], "gold": 0}],
    "winogrande": [{"context_options": ["The lion was", "qzxj qq"], "continuation": "a friend.", "gold": 0}],
    "lambada": [{"context": "The lion and the", "continuation": "girl"}],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in LINES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa_valid_labels.lst").write_text("0\n1\n")
    return folder


def likelihood(model: Any, tokenizer: Any, text: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | text), and whether it is what the model would have written."""
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        scores = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = scores[len(before) - 1 : -1]
    own = rows.gather(1, torch.tensor(after)[:, None])
    return float(own.sum()), bool((rows.argmax(-1) == torch.tensor(after)).all())


def test_scores_are_those_of_the_models_own_probabilities(files: Path, trained: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained("llama"))
    found = run(find(["arc_easy", "piqa", "hellaswag", "winogrande", "lambada"], files), model, tokenizer)

    def chosen(text: str, choices: list[str]) -> int:
        values = [likelihood(model, tokenizer, text, f" {choice}")[0] for choice in choices]
        return values.index(max(values))

    arc = [chosen(f"{row['query']}\nAnswer:", row["choices"]) == row["gold"] for row in LINES["arc_easy"]]
    assert found["arc_easy"]["acc"] == pytest.approx(sum(arc) / 3)
    pairs = zip(LINES["piqa_valid"], (0, 1), strict=True)
    piqa = [chosen(f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]]) == gold for r, gold in pairs]
    assert found["piqa"]["acc"] == pytest.approx(sum(piqa) / 2)
    [swag], [grande], [lambada] = (LINES[name] for name in ("hellaswag", "winogrande", "lambada"))
    assert found["hellaswag"]["acc"] == (chosen(swag["ctx"], swag["endings"]) == swag["gold"])
    ways = [likelihood(model, tokenizer, way, " a friend.")[0] for way in grande["context_options"]]
    assert found["winogrande"]["acc"] == (ways[0] > ways[1])
    assert found["lambada"]["acc"] == likelihood(model, tokenizer, lambada["context"], " girl")[1]
    assert {name: one["n"] for name, one in found.items()} == {
        "arc_easy": 3, "piqa": 2, "hellaswag": 1, "winogrande": 1, "lambada": 1,
    }  # fmt: skip
    assert found["piqa"]["source"] == "piqa_valid.jsonl"


def test_what_a_model_would_have_written_is_right(trained: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained("llama"))
    rows = []
    for context in ("The lion and the", "Dorothy said to the", "They went to the"):
        ids = tokenizer(context, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            written = tokenizer.decode([int(model(ids).logits[0, -1].argmax())])
        if written[:1] == " " and likelihood(model, tokenizer, context, written)[1]:
            rows += [{"context": context, "continuation": written[1:]}]  # as LAMBADA's lines have it
            rows += [{"context": f"{context} ", "continuation": "xqzj"}]
    assert rows
    (tmp_path / "follows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(find(["follows"], tmp_path), model, tokenizer)["follows"]["acc"] == 0.5


def test_eval_puts_both_models_scores_into_report_and_card(
    files: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    for _ in compress(trained("llama"), "rtn-w8", tmp_path / "small"):
        pass
    words = ["eval", str(tmp_path / "small"), "--windows", "2", "--window-len", "32", "--tasks", "arc_easy,piqa"]
    done = CliRunner().invoke(app, [*words, "--task-files", str(files), "--limit", "2"])
    assert done.exit_code == 0, done.output
    assert "arc_easy, acc_norm" in done.output
    tasks = json.loads((tmp_path / "small" / "report.json").read_text())["evaluation"]["tasks"]
    assert tasks["arc_easy"]["n"] == 2
    score = tasks["arc_easy"]["scores"]["acc"]
    assert {score["value"], score["original"]} <= {0.0, 0.5, 1.0}
    text = (tmp_path / "small" / "README.md").read_text()
    assert "| `arc_easy`, `acc`" in text
    types = {result["dataset"]["name"] for result in metadata(text)["model-index"][0]["results"]}
    assert {"arc_easy, 2 questions", "piqa, 2 questions"} <= types
    wrong = CliRunner().invoke(app, ["eval", str(tmp_path / "small"), "--limit", "2"])
    assert wrong.exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none", None, "no file for the task `none`"),
        ("bad", "not json\n", "cannot be read as a task"),
        ("bad", "", "cannot be read as a task"),
        ("bad", '{"question": "x"}\n', "is of no known kind: its lines have question"),
        ("bad", '{"query": "x", "choices": ["a"], "gold": "b"}\n', "cannot be read as a task"),
        ("bad", '{"goal": "x", "sol1": "a", "sol2": "b"}\n', "cannot be read as a task"),
    ],
)
def test_bad_files_are_refused_before_any_work(tmp_path: Path, name: str, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=problem) as refused:
        find([name], tmp_path)
    assert refused.value.hint


@pytest.mark.parametrize("evil", HOSTILE)
def test_a_tasks_name_becomes_no_markup(evil: str) -> None:
    scores = {"acc": 0.5, "acc_stderr": None}
    tasks = compared({evil: {"n": 3, "source": evil, **scores}}, None)
    good = compared({"piqa": {"n": 3, "source": "piqa.jsonl", **scores}}, None)
    text, usual = (card.render(full(evaluation=full()["evaluation"] | {"tasks": t})) for t in (tasks, good))
    assert outline(text) == outline(usual)
    assert set(metadata(text)) == set(metadata(usual))
