"""GitHub Actions, as far as the workflows here use them: jobs after each other, expressions, a shell for every `run`.

What is installed or fetched there (`uses`, `pip install`) is left out: the workspace is what a checkout would give.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)


class Names(dict[str, Any]):
    """What an expression knows; what is not there is empty."""

    def __getattr__(self, name: str) -> Any:
        found = self.get(name, "")
        return Names(found) if isinstance(found, Mapping) else found


@dataclass(frozen=True)
class Ran:
    """A shell's end.  job: with its place in the matrix."""

    job: str
    command: str
    code: int
    out: str


@dataclass
class Workflow:
    """path: its file.  workspace: where it runs.  environment: of every shell.  trust: of jobs that may ask who they
    are (`id-token: write`).  secrets, inputs: as in expressions."""

    path: Path
    workspace: Path
    environment: Mapping[str, str]
    trust: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> list[Ran]:
        """All jobs, in the order that they are written in, which is that of their needs."""
        document, done, ran = yaml.safe_load(self.path.read_text("utf-8")), dict[str, Any](), list[Ran]()
        failed = set[str]()
        for name, job in document["jobs"].items():
            known = Names(
                secrets=self.secrets, inputs=self.inputs, needs=done, github={"workspace": str(self.workspace)}
            )
            condition, needs = str(job.get("if", "true")), [job["needs"]] if "needs" in job else []
            if not evaluated(condition, known) or not ("always()" in condition or set(needs) <= done.keys() - failed):
                continue
            for chosen in matrix(job, known):
                steps, here = dict[str, Any](), known | {"matrix": chosen}
                for step in job["steps"]:
                    if "run" in step and not step["run"].startswith("pip install"):
                        names = Names(here, steps=steps)
                        ran.append(self._shell("-".join([name, *chosen.values()]), step, [document, job, step], names))
                        steps[step.get("id", "")] = {"outputs": self._outputs()}
                        if ran[-1].code:
                            failed.add(name)
                            break
            outputs = filled(job.get("outputs", {}), Names(known, steps=steps))
            done[name] = {"outputs": outputs}
        return ran

    def _shell(self, job: str, step: Mapping[str, Any], levels: list[Any], known: Names) -> Ran:
        given = {key: value for level in levels for key, value in filled(level.get("env", {}), known).items()}
        output = self.workspace.parent / "output"
        output.write_text("")
        rights = levels[1].get("permissions", levels[0].get("permissions", {}))
        trust = self.trust if rights.get("id-token") == "write" else {}
        tools = self.workspace.parent / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "hfquant").write_text(f'#!/bin/sh\nexec {sys.executable} -m hfquant "$@"\n')
        (tools / "hfquant").chmod(0o755)
        around = {"PATH": f"{tools}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(output), "GITHUB_ACTIONS": "true"}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=self.workspace, text=True, check=False,
            env={**self.environment, **around, **trust, **given}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return Ran(job, step["run"], done.returncode, done.stdout)

    def _outputs(self) -> dict[str, str]:
        lines = (self.workspace.parent / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


def matrix(job: Mapping[str, Any], known: Names) -> Iterator[dict[str, str]]:
    """What a job runs for; without a matrix, once."""
    if "strategy" not in job:
        yield {}
        return
    ((name, values),) = job["strategy"]["matrix"].items()
    for value in evaluated(EXPRESSION.fullmatch(values)[1], known):  # type: ignore[index]
        yield {name: value}


def filled(texts: Mapping[str, Any], known: Names) -> dict[str, str]:
    """Texts with their expressions' values."""
    return {key: EXPRESSION.sub(lambda found: str(evaluated(found[1], known)), str(t)) for key, t in texts.items()}


def evaluated(expression: str, known: Names) -> Any:
    """`and` and `or` give one of their sides in Python as there."""
    python = expression.strip().replace("&&", " and ").replace("||", " or ")
    functions = {"fromJSON": json.loads, "always": lambda: True, "true": True}
    return eval(python, {"__builtins__": {}}, {**functions, **{name: Names(value) for name, value in known.items()}})
