"""The program as a whole: quick to answer, and every command says what it does."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from hfquant import __version__
from hfquant.recipe import Recipe
from hfquant.recipe_source import presets

Run = Callable[..., Result]
COMMANDS = ("compress", "eval", "inspect", "recipes", "generate", "offload")


# what drawing the help takes: typer, and what it draws with; torch alone takes three seconds, pydantic a tenth of one
LIGHT = {
    "annotated_doc", "attr", "attrs", "click", "markdown_it", "mdurl", "pygments", "rich", "shellingham", "typer",
    "typing_extensions",
}  # fmt: skip


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "hfquant", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 1
    assert all(command in done.stdout for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = """
import runpy, sys
sys.argv = ["hfquant", "--help"]
before = set(sys.modules)
try:
    runpy.run_module("hfquant", run_name="__main__")
finally:
    print("loaded:", *(set(sys.modules) - before), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--help" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.rpartition("loaded:")[2].split()}
    libraries = {name for name in loaded if not name.startswith("_")} - set(sys.stdlib_module_names) - {"hfquant"}
    assert {"typer", "rich"} <= libraries
    assert libraries <= LIGHT


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"hfquant {__version__}\n"


def test_unknown_command(run: Run) -> None:
    done = run("compres")
    assert done.exit_code == 2
    assert "'compress'" in done.stderr


def test_recipes_lists_the_presets(run: Run) -> None:
    lines = run("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *presets()]
    assert list(json.loads(run("recipes", "--json").stdout)) == list(presets())


def test_recipe_is_printed_as_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(run("recipes", "rtn-w5g32", "--set", "rtn.search=0").stdout)
    assert Recipe.parse(path) == Recipe.parse("rtn-w5g32", ["rtn.search=0"])
    assert json.loads(run("recipes", "rtn-w8", "--json").stdout)["grid"]["bits"] == 8


def test_schema_is_json(run: Run) -> None:
    assert json.loads(run("recipes", "--schema").stdout)["title"] == "Recipe"


def test_unknown_recipe(run: Run) -> None:
    done = run("recipes", "rtm-w4")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: unknown method `rtm`\n\nhint: did you mean `rtn`?")


@pytest.mark.parametrize("command", [["eval"], ["inspect"], ["generate", "--prompt", "x"]], ids=lambda c: str(c[0]))
def test_a_folder_that_is_no_compressed_model(run: Run, tmp_path: Path, command: list[str]) -> None:
    done = run(*command, tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: `{tmp_path}` is not a compressed model: it has no config.json\n\nhint: give")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "holds a model that is not compressed" in run(*command, tmp_path).stderr


def test_eval(run: Run, fake: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "hfquant"}}')
    done = run("eval", tmp_path, "--against", "org/model", "--windows", "4", "--window-len", "128")
    assert "perplexity       29.45 -> 32.31 (x 1.097)" in done.stdout
    _, folder, settings = fake.asked[0]  # type: ignore[attr-defined]
    assert folder == tmp_path
    assert settings == {
        "against": "org/model",
        "text": None,
        "windows": 4,
        "window_len": 128,
        "dtype": "auto",
        "tasks": None,
        "kernels": "exact",
    }
    found = json.loads(run("eval", tmp_path, "--json").stdout)
    assert set(found) == {"evaluation", "sample", "gate"}
