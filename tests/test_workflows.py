"""The files in workflows/: safe by their form, and every command in them is one that hfquant has."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hfquant.cli import app
from hfquant.conversion.fleet.manifest import read_manifest

FOLDER = Path(__file__).parent.parent / "workflows"
ACTIONS = sorted(FOLDER.glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_there_are_some() -> None:
    assert [path.name for path in ACTIONS] == ["convert.yml", "fleet.yml"]


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_rights_are_few(path: Path) -> None:
    document = read(path)
    triggers = document[True]  # `on`, as YAML 1.1 reads it
    assert not {"pull_request_target", "pull_request", "issue_comment", "workflow_run"} & set(triggers)
    assert document["permissions"] == {"contents": "read"}
    for job in document["jobs"].values():
        assert job["permissions"] in ({"contents": "read"}, {"contents": "read", "id-token": "write"})
        assert job["timeout-minutes"] <= 360
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", ACTIONS, ids=lambda path: path.stem)
def test_what_others_typed_is_never_part_of_a_command(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", ""), "inputs go through the environment, where the shell quotes them"


def commands() -> list[list[str]]:
    runs = [step["run"] for path in ACTIONS for step in steps(path) if "run" in step]
    found = [shlex.split(command) for run in runs for command in re.findall(r"(?:^|\()(hfquant [^)\n]*)", run, re.M)]
    tree = ast.parse((FOLDER / "job.py").read_text("utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.List) and node.elts]
    for node in lists:
        words = [element.value for element in node.elts if isinstance(element, ast.Constant)]
        if words and words[0] in ("fleet", "worker"):
            found.append(["hfquant", *map(str, words)])
    return [words for words in found if words[0] == "hfquant"]


def test_every_command_exists_with_its_options() -> None:
    group = typer.main.get_command(app)
    assert len(commands()) == 9
    for words in commands():
        command: Any = group
        rest = words[1:]
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_the_example_is_a_fleet() -> None:
    assert read_manifest(FOLDER / "fleet.yaml").models
