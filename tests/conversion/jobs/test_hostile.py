"""Models made to cause harm: refused or failed in words, the worker alive, nothing of theirs run or kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfquant.conversion.settings import Limits
from hfquant.conversion.worker import Worker
from hfquant.errors import HubError, SourceError
from tests.hub.fixtures import TOKENS

from .conftest import Desk


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def remote_code(model: Path) -> None:
    change(
        model / "config.json", model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    (model / "evil.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')")


def hundred_thousand_layers(model: Path) -> None:
    change(model / "config.json", num_hidden_layers=100_000)


def more_layers_than_weights(model: Path) -> None:
    change(model / "config.json", num_hidden_layers=2_000)


def endless_config(model: Path) -> None:
    (model / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def already_quantized(model: Path) -> None:
    change(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def lying_header(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-500])


def no_derivatives(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")


def no_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


REFUSED: list[tuple[Callable[[Path], None], str, str]] = [
    (remote_code, "SourceError", "own modelling code, which is never run here"),
    (hundred_thousand_layers, "SourceError", "100,000, more than 2,048"),
    (more_layers_than_weights, "SourceError", "says 2,000 layers, its files hold 3"),
    (endless_config, "SourceError", "nested|is not JSON"),
    (already_quantized, "SourceError", "already quantized"),
    (lying_header, "SourceError", "bytes are promised"),
    (no_derivatives, "RequestError", "forbids changed copies"),
    (no_tokenizer, "SourceError", "has no tokenizer"),
]


def test_refused_from_headers(desk: Desk, model: Path) -> None:
    """One worker, and one bad model after the other: none costs it more than a look, the last one is good."""
    whole = Path(shutil.copytree(model, desk.folder / "whole"))
    desk.work(real=False)
    for spoil, kind, words in REFUSED:
        shutil.rmtree(model)
        shutil.copytree(whole, model)
        spoil(model)
        del desk.hub.store.repos["alice/model"]
        desk.hub.store.upload("alice/model", model)
        desk.hub.faults.log.clear()
        failed = desk.ended(desk.submit())
        assert failed.failure is not None, spoil.__name__
        assert failed.failure.kind == kind, failed.failure
        assert any(word in failed.failure.message for word in words.split("|")), failed.failure
        fetched = [e for e in desk.hub.faults.log if "/resolve/" in e and not e.endswith((".json", ".safetensors"))]
        assert fetched == [], "no code"
    assert not (desk.folder / "ran").exists()
    del desk.hub.store.repos["alice/model"]
    desk.hub.store.upload("alice/model", whole)
    assert desk.ended(desk.submit()).state == "done"


def test_pickles_are_not_even_queued(desk: Desk, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    desk.hub.store.upload("alice/pickled", model)
    with pytest.raises(SourceError, match="only pickled weights"):
        desk.service.submit(desk.request() | {"model": "alice/pickled"}, "alice", TOKENS["alice"])
    assert desk.hub.faults.asked("GET", "pytorch_model.bin") == []
    assert desk.service.jobs("alice") == []


def bursting_regex(model: Path) -> None:
    found = json.loads((model / "tokenizer.json").read_text())
    bomb = "^(([a-zA-Z ])+.)+[A-Z]([a-z ])+$"
    found["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": bomb}, "behavior": "Isolated", "invert": False}
    (model / "tokenizer.json").write_text(json.dumps(found))


def test_a_regex_that_makes_the_tokenizer_panic(desk: Desk, model: Path) -> None:
    """What Rust throws is no `Exception`; the job fails, the worker takes the next one."""
    bursting_regex(model)
    desk.hub.store.upload("alice/bad", model)
    desk.work()
    job = desk.service.submit(desk.request() | {"model": "alice/bad"}, "alice", TOKENS["alice"]).id
    failed = desk.ended(job)
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.message) == ("Bug", "the work failed: PanicException")
    logs = [str(event.data["text"]) for event in desk.service.events(job, "alice") if event.kind == "log"]
    assert any("retry-limit" in text for text in logs), "its owner can read why"
    assert desk.workers[0].poll() is None


def endless_template(model: Path) -> None:
    loops = "".join(f"{{% for x{n} in range(99999) %}}" for n in range(6))
    text = loops + "x" + "{% endfor %}" * 6 + "{{ 'a' * 3000000000 }}"
    (model / "chat_template.jinja").write_text(text)
    change(model / "tokenizer_config.json", chat_template=text)


def test_a_models_chat_template_is_never_run(desk: Desk, model: Path) -> None:
    """One that would take for ever: it is carried over as a text, and costs nothing."""
    endless_template(model)
    desk.hub.store.upload("alice/endless", model)
    desk.work()
    job = desk.service.submit(desk.request() | {"model": "alice/endless"}, "alice", TOKENS["alice"]).id
    done = desk.ended(job)
    assert (done.state, done.failure) == ("done", None)
    assert "chat_template.jinja" in desk.arrived("alice/small")


def test_work_that_hangs_is_stopped(desk: Desk) -> None:
    """However it came to hang: after its time the child is killed, and the job says so."""

    def prepare(worker: Worker) -> None:
        from hfquant.conversion import tasks

        def hang(*_: Any) -> Any:
            while True:
                pass

        tasks.TASKS["evaluate"] = hang
        worker.conversions.tools.settings.limits.__dict__["seconds"] = 5

    job = desk.submit()
    desk.work(prepare, real=False)
    failed = desk.ended(job)
    assert failed.failure is not None
    assert failed.failure.kind == "ResourceError"
    assert "longer than" in failed.failure.message or "processor time" in failed.failure.message
    assert {step.name: step.state for step in failed.steps}["evaluate"] == "failed"


def test_too_large(desk: Desk) -> None:
    desk.service._board.limits = Limits()
    desk.work(lambda worker: worker.conversions.tools.settings.limits.__dict__.update(parameters=1000))
    failed = desk.ended(desk.submit())
    assert failed.failure is not None
    assert (failed.failure.kind, "at most 0.0 are taken here" in failed.failure.message) == ("LimitError", True)


def test_foreign_repositories_are_not_pushed_to(desk: Desk, model: Path) -> None:
    """Not what others made, not where one may not write, also when that changes while the job is under way."""
    desk.hub.store.upload("alice/theirs", model)
    with pytest.raises(HubError, match="hfquant did not make"):
        desk.submit(target="alice/theirs")
    with pytest.raises(HubError, match="may not create"):
        desk.submit(target="bob/mine")
    with pytest.raises(HubError, match="hfquant did not make"):
        desk.submit(target="alice/model")
    job = desk.submit()
    desk.hub.store.upload("alice/small", model)
    desk.work()
    failed = desk.ended(job)
    assert failed.failure is not None
    assert "hfquant did not make" in failed.failure.message
    assert desk.commits("alice/small") == 1
