"""The files of a Space: no right more than needed, and the versions that are tested."""

from pathlib import Path

import yaml

import space_app

FOLDER = Path(space_app.__file__).parent


def header() -> dict:
    return yaml.safe_load((FOLDER / "README.md").read_text("utf-8").split("---")[1])


def test_scopes_are_the_least() -> None:
    assert set(header()["hf_oauth_scopes"]) == {"contribute-repos", "gated-repos", "read-repos"}


def test_what_it_names_is_there() -> None:
    assert (FOLDER / header()["app_file"]).is_file()
    assert "hfquant[space]" in (FOLDER / "requirements.txt").read_text("utf-8")


def test_version_of_gradio_is_the_tested_one() -> None:
    constraints = FOLDER.parent / "constraints.txt"
    assert f"gradio=={header()['sdk_version']}\n" in constraints.read_text("utf-8")
