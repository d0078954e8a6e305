"""Whole models learn on their grids: what is written is what was trained, and nothing stops it for good."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hfquant
from hfquant.errors import HfquantError
from hfquant.measure.evaluate import perplexity
from hfquant.model.texts import packaged
from hfquant.train import plan, train
from hfquant.train.data import arguments, collate
from hfquant.train.modules import learners
from hfquant.train.run import begin, prepare
from hfquant.train.write import write
from tests import families
from tests.compress.folders import digests

QUICK: dict[str, Any] = {"method": "quantgpt", "batch": 8, "seq_len": 64, "epochs": 1}


def recipe(grid: str = "w2", **options: Any) -> dict[str, Any]:
    more = {key: options.pop(key) for key in ("activations",) if key in options}
    return {"steps": [QUICK | options], "grid": grid, "dtype": "keep", **more}


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(packaged("calibration")[:6000])
    return str(file)


def logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**arguments(model, batch)).logits
    return found


CASES: dict[str, dict[str, Any]] = {
    "gpt2": recipe(),
    "bart": recipe("w4", per="group", negatives=8, projection=16, activations=None),
    "t5": recipe("w2", quantizer="laq", token_scaled=True, activations=None),
    "llama": recipe("w3g32", quantizer="lsq", contrast=0, truth=0.5),
    "gemma3": recipe("w8", quantizer="pact", momentum=0, activations=None),
}


@pytest.mark.parametrize("family", CASES)
def test_the_checkpoint_predicts_what_the_trained_model_did(
    family: str, trained: Callable[[str], Path], built: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    """Codes and scales are stored as trained: nothing is rounded twice, and a tied head shares its table."""
    source = (trained if families.FAMILIES[family].quick else built)(family)
    todo = plan(source, CASES[family], text, tmp_path / "out")
    trainer = begin(todo)
    before = {name: layer.quantized() for name, layer in learners(trainer.model)}
    trainer.train()
    student = trainer.model.eval()
    write(student, todo)
    batch = collate([todo.sequences[i] for i in range(4)], 0)
    loaded = hfquant.load(todo.out, dtype=torch.float32).eval()
    wanted, found = logits(student, batch), logits(loaded, batch)
    if todo.recipe.activations is None:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:  # where a sum ends between two codes of an input, its order decides
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    modules = dict(loaded.named_modules())
    for name, layer in learners(student):
        stored, now = modules[name].quantized(), layer.quantized()
        assert torch.equal(stored.codes, now.codes), name
        assert torch.equal(stored.scale, now.scale), name
        assert stored.activations == now.activations, name
    changed = [n for n, layer in learners(student) if not torch.equal(layer.quantized().codes, before[n].codes)]
    assert len(changed) > len(before) / 2


def test_it_learns_and_the_head_keeps_the_tables_grid(trained: Callable[[str], Path], tmp_path: Path) -> None:
    """At 2 bit, closer to the original than before training by half; the report says what was done."""
    whole, windows = recipe(epochs=3, lr=5e-3, scale_lr=5e-3), families.held_out(16)
    source = trained("gpt2")
    (tmp_path / "text.txt").write_text(packaged("calibration")[:24000])
    todo = plan(source, whole, str(tmp_path / "text.txt"), tmp_path / "out")
    rounded = type(todo.skeleton.model).from_pretrained(source, dtype=torch.float32).eval()
    prepare(rounded, todo)
    assert rounded.lm_head.own is rounded.transformer.wte.own
    first = perplexity(rounded, windows).perplexity
    best = perplexity(begin(todo).teacher, windows).perplexity
    told: list[Mapping[str, float]] = []
    report = train(todo, told.append)
    assert report is not None
    last = perplexity(hfquant.load(todo.out, dtype=torch.float32), windows).perplexity
    assert last - best < 0.5 * (first - best), (first, last, best)
    assert {"loss_logits", "loss_contrast"} <= told[0].keys()
    assert report["compression"]["training"]["steps"] == told[-1]["steps"]
    assert report["calibration"]["sha256"] == todo.sha256
    assert all(0 < row["error"] < 2 for row in report["layers"])
    assert sorted(f.name for f in todo.out.iterdir()) == sorted([*report["output"]["files"], "report.json"])


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bart", marks=pytest.mark.slow)]
)
def test_gradient_checkpointing_changes_no_byte_and_bfloat16_little(
    family: str, trained: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    """What is computed twice comes out the same twice: rounded inputs, weights on their grids, the projection."""
    source, told = trained(family), {}
    for name, options in {
        "plain": [],
        "checkpointed": ["gradient_checkpointing=true"],
        "both": ["gradient_checkpointing=true", "bf16=true"],
    }.items():
        logs: list[Mapping[str, float]] = []
        todo = plan(source, recipe(), text, tmp_path / name, options=[*options, "logging_steps=1"])
        report = train(todo, logs.append)
        assert report is not None
        told[name] = [log["loss"] for log in logs if "loss" in log]
        assert report["compression"]["compute_dtype"] == ("bfloat16" if name == "both" else "float32")
    weights = [digests(tmp_path / name)["model.safetensors"] for name in told]
    assert weights[0] == weights[1] != weights[2]
    assert told["both"] == pytest.approx(told["plain"], rel=0.05)
    assert told["both"][-1] < told["both"][0]


class Killed(Exception):
    pass


def test_killed_and_resumed_it_ends_in_the_same_bytes(
    trained: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    """With dropout, drawn negatives and the memory bank: all that is random or remembered goes on as it was."""
    whole = recipe(dropout=True, negatives=4, epochs=2)
    given: dict[str, Any] = {"options": ["logging_steps=1"], "save_every": 5}

    def stop(logs: Mapping[str, float]) -> None:
        if logs["step"] == 13:
            raise Killed

    undisturbed = plan(trained("gpt2"), whole, text, tmp_path / "undisturbed", **given)
    assert undisturbed.resume is None
    train(undisturbed)
    with pytest.raises(Killed):
        train(plan(trained("gpt2"), whole, text, tmp_path / "killed", **given), stop)
    (tmp_path / "killed" / ".hfquant" / "train" / "checkpoint-15").mkdir()  # one that was being written
    again = plan(trained("gpt2"), whole, text, tmp_path / "killed", **given)
    assert again.resume is not None
    assert again.resume.name == "checkpoint-10"
    train(again)
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert not (tmp_path / "killed" / ".hfquant").exists()


def test_another_training_is_not_continued(trained: Callable[[str], Path], text: str, tmp_path: Path) -> None:
    todo = plan(trained("gpt2"), recipe(), text, tmp_path / "out")
    begin(todo)
    with pytest.raises(HfquantError, match="another recipe"):
        plan(trained("gpt2"), recipe(lr=1e-3), text, tmp_path / "out")
    with pytest.raises(HfquantError, match="another options"):
        plan(trained("gpt2"), recipe(), text, tmp_path / "out", options=["max_grad_norm=2"])
    plan(trained("gpt2"), recipe(), text, tmp_path / "out", options=["logging_steps=1"])
    plan(trained("gpt2"), recipe(lr=1e-3), text, tmp_path / "out", fresh=True)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(trained: Callable[[str], Path], text: str, tmp_path: Path) -> None:
    """The batch of a step is theirs together, and gradients of what is compared are shared too."""
    scores = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ["--recipe", "quantgpt-w4a8", "--text", text, "--out", str(out), "--set", "quantgpt.epochs=2"]
        more = ["--set", "quantgpt.seq_len=64", "--set", "quantgpt.batch=8", "--json"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "hfquant"]
        subprocess.run([*launch, "train", str(trained("gpt2")), *words, *more], check=True, capture_output=True)
        scores.append(json.loads((out / "report.json").read_text()))
        assert not (out / ".hfquant").exists()
    one, two = (score["compression"]["training"] for score in scores)
    assert one["steps"] == two["steps"]
    assert two["loss"] == pytest.approx(one["loss"], rel=0.01)


REFUSED: dict[str, tuple[str, Any, list[str], str]] = {
    "a recipe that does not train": ("gpt2", "rtn-w4g64", [], "does not train"),
    "levels that are not symmetric": ("gpt2", recipe("w2asym"), [], "asymmetric"),
    "other steps": ("gpt2", {"steps": [QUICK, {"method": "rtn"}], "grid": "w4sym"}, [], "cannot be combined"),
    "experts": ("mixtral", recipe(), [], "fused experts"),
    "sequences too long": ("gpt2", recipe(seq_len=512), [], "longer than the model's 256"),
    "too little text": ("llama", recipe(seq_len=8192), [], "less than one sequence"),
    "an unknown option": ("gpt2", recipe(), ["bf61=true"], "did you mean `bf16`"),
    "an option said elsewhere": ("gpt2", recipe(), ["learning_rate=1"], "quantgpt.lr"),
    "no option": ("gpt2", recipe(), ["bf16"], "KEY=VALUE"),
    "a batch that cannot be shared": ("gpt2", recipe(), ["gradient_accumulation_steps=3"], "cannot be shared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, built: Callable[[str], Path], text: str, tmp_path: Path) -> None:
    family, asked, options, message = REFUSED[case]
    with pytest.raises(HfquantError, match=message):
        plan(built(family), asked, text, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_it_is_for_hfquant_train_alone(built: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(HfquantError, match="hfquant train"):
        hfquant.plan(built("gpt2"), recipe(), tmp_path / "out")
    with pytest.raises(HfquantError, match="hfquant train"):
        hfquant.HfQuantConfig("quantgpt-w2a8")


def test_pairs_are_read_and_bad_lines_named(built: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"source": "the lion and the girl", "target": "lion"}\n{"source": "a road", "target": "r"}\n')
    todo = plan(built("bart"), recipe(batch=2), str(file), tmp_path / "out")
    batch = collate([todo.sequences[0], todo.sequences[1]], 0)
    assert batch["attention_mask"].sum(1).tolist() == [21, 6]
    assert (batch["labels"] != -100).sum(1).tolist() == [4, 1]
    trainer = begin(todo)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    file.write_text('{"source": "the lion"}\n')
    with pytest.raises(HfquantError, match="line 1"):
        plan(built("bart"), recipe(), str(file), tmp_path / "other")
