"""Programs do what people do, with their own rights and no others."""

from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client

from tests.conversion.jobs.conftest import RECIPE
from tests.hub.fixtures import TOKENS
from tests.space.conftest import Site, bearer


def client(site: Site, user: str | None) -> Client:
    return Client(site.url, headers=bearer(user) if user else {}, verbose=False)


def ask(who: Client, name: str, **arguments: Any) -> Any:
    return who.predict(api_name=f"/{name}", **arguments)


def test_from_asking_to_the_pushed_model_and_nobody_else_sees_it(site: Site) -> None:
    site.desk.work()
    alice, bob, nobody = (client(site, user) for user in ("alice", "bob", None))
    wish = {"model": "alice/model", "recipe": RECIPE, "target": "alice/small"}

    seen = ask(nobody, "preview", conversion=wish)
    assert seen["model"]["parameters"] > 0
    with pytest.raises(Exception, match="log in"):
        ask(nobody, "submit", conversion=wish)

    given = ask(alice, "submit", conversion=wish)
    assert given["created"]
    job = given["id"]
    assert ask(alice, "submit", conversion=wish) == {"id": job, "created": False}

    for who in (bob, nobody):
        for name in ("status", "cancel", "resume", "report", "publish"):
            with pytest.raises(Exception, match=r"no such job|log in"):
                ask(who, name, job=job)
    assert ask(bob, "jobs") == []

    site.desk.ended(job)
    done = ask(alice, "status", job=job)
    assert done["state"] == "done", done["failure"]
    assert done["pushed"]["repo"] == "alice/small"
    assert "model.safetensors" in site.desk.arrived("alice/small")
    assert ask(alice, "report", job=job)["evaluation"]["perplexity"] > 0
    assert [one["id"] for one in ask(alice, "jobs")] == [job]


def test_what_is_wrong_is_said_in_words(site: Site) -> None:
    alice = client(site, "alice")
    for wish, said in (
        ({"model": "alice/model", "recipe": "gqtp-w4g64"}, "gptq"),
        ({"model": "alice/none", "recipe": "rtn-w8", "target": "alice/x"}, "alice/none is not on the Hub"),
        ({"model": "alice/model", "recipe": "rtn-w8", "target": "bob/x"}, "bob"),
        ({"modle": "alice/model", "recipe": "rtn-w8"}, "did you mean `model`"),
        ({"model": "alice/model", "recipe": "rtn-w8", "priority": 1}, "goes before other people"),
        ({"model": "alice/model", "recipe": "rtn-w8", "executor": "ray"}, "for whoever runs this service"),
        ({"model": "alice/model", "recipe": "rtn-w8", "executor": ["ray"]}, "executor"),
        ({"model": "alice/model", "recipe": "rtn-w8", "priority": "1"}, "priority"),
        (["alice/model"], "a conversion should be an object"),
        ("alice/model", "a conversion should be an object"),
    ):
        with pytest.raises(Exception, match=said):
            ask(alice, "submit", conversion=wish)
    assert site.desk.service.jobs("alice") == []
    with pytest.raises(Exception, match="token"):
        ask(Client(site.url, headers={"Authorization": "Bearer hf_nobody"}, verbose=False), "jobs")


def test_only_these_calls_are_offered(site: Site) -> None:
    offered = client(site, None).view_api(return_format="dict")["named_endpoints"]
    own = {name for name in offered if not name.startswith("/_")}  # the login button has one of gradio's
    assert own == {f"/{n}" for n in ("preview", "submit", "status", "jobs", "report", "cancel", "resume",
                                         "publish")}  # fmt: skip


def test_the_documented_program_runs(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Only names are changed."""
    text = (Path(__file__).parents[2] / "docs" / "space.md").read_text("utf-8").partition("## For programs")[2]
    program = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    names = {"https://your-name-hfquant.hf.space": site.url, "org/model": "alice/model", "your-name": "alice"}
    for known, here in names.items():
        program = program.replace(known, here)
    monkeypatch.setenv("HF_TOKEN", TOKENS["alice"])
    exec(compile(program, "space.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "queued" in shown
    (job,) = site.desk.service.jobs("alice")
    assert (job.state, job.request["target"]) == ("cancelled", "alice/model-8bit")


def test_what_a_model_is_called_is_not_obeyed(site: Site) -> None:
    """Markdown and HTML in a caller's text come back as text, never as an error of ours."""
    evil = "<img src=x onerror=alert(1)>](javascript:alert(1))"
    seen = ask(client(site, "alice"), "preview", conversion={"model": evil, "recipe": evil})
    assert not seen["allowed"]
    assert seen["problems"]
