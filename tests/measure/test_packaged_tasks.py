"""The questions that come with hfquant: asked as lm-eval asks its own, with no network, and into report and card."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.compress import compress
from hfquant.errors import CalibrationError
from hfquant.measure import tasks
from hfquant.measure.questions import PACKAGED, packaged, read
from hfquant.measure.verify import verify
from tests.measure.test_card import metadata

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's
pytest.importorskip("lm_eval", reason="an extra: hfquant[eval]")

Row = Mapping[str, Any]
QUESTIONS = 100
FEW = 12
OWN = {"arc_easy": "arc/arc_easy", "hellaswag": "hellaswag/hellaswag", "piqa": "piqa/piqa",
       "winogrande": "winogrande/default"}  # fmt: skip


def as_published(name: str, row: Row) -> dict[str, Any]:
    """A question of hfquant's in the form in which its data set has it on the Hub, which lm-eval reads."""
    if name == "arc_easy":
        letters = list("ABCD")
        question = str(row["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": row["choices"], "label": letters}
        return {"question": question, "choices": choices, "answerKey": letters[row["gold"]]}
    if name == "hellaswag":
        label, context = str(row["query"]).split(": ", 1)
        a, b = re.fullmatch(r"(.+[.!?]) ([^.!?]+)", context).groups()  # type: ignore[union-attr]
        known = {"activity_label": label, "ctx_a": a, "ctx_b": b.lower()}
        return known | {"endings": row["choices"], "label": str(row["gold"])}
    if name == "piqa":
        goal = str(row["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")
        return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
    first, second = row["context_options"]
    shared = next(i for i in range(len(first) + 1) if first[: i + 1] != second[: i + 1])
    gap = first.rfind(" ", 0, shared) + 1
    sentence = f"{first[:gap]}_ {row['continuation']}"
    return {"sentence": sentence, "option1": first[gap:], "option2": second[gap:], "answer": str(row["gold"] + 1)}


def own(name: str, folder: Path) -> dict[str, Any]:
    """lm-eval's task, word for word, but for where its questions are."""
    from lm_eval.tasks._yaml_loader import load_yaml

    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    config = load_yaml(Path(spec.origin).parent / "tasks" / f"{OWN[name]}.yaml", resolve_func=True)
    _, rows = read(packaged()[name])
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(as_published(name, row)) + "\n" for row in rows[:FEW]))
    config |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "test_split": None}
    config |= {"validation_split": "validation", "task": name, "tag": None}
    kwargs = {"data_files": {"validation": str(file)}, "cache_dir": str(folder / "cache")}
    return {key: value for key, value in (config | {"dataset_kwargs": kwargs}).items() if key != "tag"}


def requests(task: Any) -> list[Any]:
    task.build_all_requests(limit=FEW)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", OWN)
def test_lm_eval_asks_and_scores_the_same(name: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    theirs = own(name, tmp_path)
    ours = tasks._task(name, packaged()[name], tmp_path)
    asked = [requests(manager.load([config])["tasks"][name]) for config in (ours, theirs)]
    assert asked[0] == asked[1], "the very texts that the model gets"
    assert len(asked[0]) >= 2 * FEW

    model = AutoModelForCausalLM.from_pretrained(trained("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained("llama"))
    done = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[theirs],
        task_manager=manager,
        bootstrap_iters=100,
    )
    found = tasks.run(tasks.find([name], limit=FEW), model, tokenizer)[name]
    assert done is not None
    expected = done["results"][name]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert found.get(metric) == expected.get(f"{metric},none"), metric
    assert (found["n"], found["source"]) == (FEW, "a selection that comes with hfquant")


def test_every_file_is_whole_and_says_where_it_is_from() -> None:
    licences = (PACKAGED / "LICENSES.md").read_text()
    assert packaged().keys() == OWN.keys()
    for name, path in packaged().items():
        _, rows = read(path)
        assert len({json.dumps(row) for row in rows}) == QUESTIONS
        choices = [row.get("choices") or row["context_options"] for row in rows]
        assert all(0 <= row["gold"] < len(of) for row, of in zip(rows, choices, strict=True))
        assert len({row["gold"] for row in rows}) == len(choices[0]), "every place has right answers"
        assert f"| `{path.name}` |" in licences, name
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) < 1_000_000


def test_an_answer_longer_than_the_model_can_read_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained("llama"))
    asked = tasks.find(["winogrande", "piqa"])
    tasks.check_lengths(asked, tokenizer, None)
    tasks.check_lengths(asked, tokenizer, 1024)
    for _ in compress(trained("llama"), "rtn-w8", tmp_path / "small"):
        pass
    with pytest.raises(CalibrationError, match=r"question \d+ of `piqa` has an answer of \d+ tokens; this model reads"):
        verify(tmp_path / "small", windows=2, window_len=32, tasks=asked)
    assert "evaluation" not in json.loads((tmp_path / "small" / "report.json").read_text()), "before any work"


def test_eval_asks_them_offline_and_says_how_many(trained: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(trained("llama"), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["max_position_embeddings"] = 1024  # of rotary embeddings, which have no parameters
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    for _ in compress(tmp_path / "dense", "rtn-w8", tmp_path / "small"):
        pass
    words = ["eval", str(tmp_path / "small"), "--windows", "2", "--window-len", "32", "--tasks", "piqa,winogrande"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert re.search(r"piqa, acc +\d+\.\d% -> \d+\.\d% of 100\n", done.output)
    told = json.loads((tmp_path / "small" / "report.json").read_text())["evaluation"]["tasks"]
    assert {name: (task["n"], task["source"]) for name, task in told.items()} == {
        name: (QUESTIONS, "a selection that comes with hfquant") for name in ("piqa", "winogrande")
    }
    text = (tmp_path / "small" / "README.md").read_text()
    assert "`piqa`, 100 questions of `a selection that comes with hfquant`" in text
    assert "| `winogrande`, `acc` (± " in text
    named = {result["dataset"]["name"] for result in metadata(text)["model-index"][0]["results"]}
    assert {"piqa, 100 questions", "winogrande, 100 questions"} <= named, "not taken for the whole data set"


def test_the_help_names_them() -> None:
    shown = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in packaged())


def test_whole_tasks_are_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(tasks, "_fetch", fetched.extend)
    assert tasks.find(["piqa"]).files.keys() == {"piqa"}
    assert not fetched
    assert not tasks.find(["piqa", "boolq"], whole=True).files
    assert fetched == ["piqa", "boolq"]
    assert tasks.find(["piqa", "boolq"]).files.keys() == {"piqa"}


class Listed:
    """lm-eval's list of tasks, none of whose questions can be fetched."""

    all_subtasks = ("boolq", "arc_challenge")

    def load(self, names: list[str]) -> None:
        raise ConnectionError(f"no network for {names[0]}")


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("piqqa", "lm-eval has no task `piqqa`", "did you mean `piqa`?"),
        ("zzzz", "lm-eval has no task `zzzz`", "with hfquant come arc_easy, hellaswag, piqa, winogrande"),
        ("boolq", "cannot fetch the questions of `boolq`: no network for boolq", "`--task-files` asks those"),
        ("", "no task is named", "with hfquant come"),
    ],
)
def test_names_that_cannot_be_asked_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, name: str, problem: str, hint: str
) -> None:
    monkeypatch.setattr(tasks, "_manager", lambda own: Listed())
    with pytest.raises(CalibrationError, match=re.escape(problem)) as refused:
        tasks.find([name] if name else [])
    assert hint in str(refused.value.hint)


@pytest.mark.slow
def test_lm_evals_own_list_is_looked_at_and_its_data_asked_for() -> None:
    """HF_HUB_OFFLINE is set: what is not there cannot be fetched, and that is said before any work."""
    with pytest.raises(CalibrationError, match="cannot fetch the questions of `boolq`"):
        tasks.find(["boolq"])
    with pytest.raises(CalibrationError, match="lm-eval has no task `bolq`") as refused:
        tasks.find(["bolq"])
    assert refused.value.hint == "did you mean `boolq`?"
