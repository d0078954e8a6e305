"""The documentation is executed: every `$ hfquant` command and every Python example, on a small model.

Its tables are generated.  `python -m tests.test_docs` writes them anew.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hfquant import methods
from hfquant.conversion import sandbox
from hfquant.recipe import ActivationSpec, CacheSpec, Recipe
from hfquant.recipe_source import presets, read_file
from tests.conversion.jobs import forks
from tests.hub.server import Hub
from tests.model import gguf_files
from tests.words import cut_words

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^<!-- (\w+)(?:: (\w+))? -->\n(?:\|.*\n)*", re.MULTILINE)
LENGTH = 1024  # positions, so that the recipes' own settings fit the small model
NOTES = "The lion walked down the yellow road, and the girl followed him with her dog. " * 400


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of the code on a page, in order."""
    yield from BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(content: str) -> Iterator[list[str]]:
    """The commands of a console block; lines without `$` are their output."""
    for line in content.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield shlex.split(line[2:])


def run(words: list[str]) -> None:
    """One command, in this process."""
    from hfquant.cli import app

    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{shlex.join(words)} exits with {done.exit_code}:\n{done.output}"


@pytest.fixture
def desk(trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    """A folder to work in, with what the documentation mentions: a model, a GGUF file, a text, a Hub."""
    hub.store.create("bob/model")
    monkeypatch.setenv("HFQUANT_FOLDER", str(tmp_path / "service"))
    monkeypatch.setenv("HFQUANT_USER", "alice")
    monkeypatch.setattr(sandbox, "start", forks.start)  # Python need not be begun anew for every child
    shorter(trained("llama"), tmp_path / "MODEL")
    hub.store.upload("org/model", tmp_path / "MODEL")
    small = gguf_files.FAMILIES["llama"]
    small = replace(small, kv=small.kv | {"context_length": LENGTH})
    gguf_files.write_gguf(tmp_path / "MODEL.gguf", small, extra=gguf_files.bpe_vocabulary())
    (tmp_path / "notes.txt").write_text(NOTES)
    cut_words(tmp_path / "MODEL")
    (tmp_path / "tasks").mkdir()
    for name in ("arc_easy", "mine"):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text('{"query": "Who?", "choices": ["a lion", "x"], "gold": 0}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The lion"}\n{"prompt": "A road"}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorter(model: Path, to: Path) -> None:
    """The model without its last block, for texts of LENGTH tokens: rotary embeddings have no parameters."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    config["max_position_embeddings"] = LENGTH
    (to / "config.json").write_text(json.dumps(config))
    last = f"model.layers.{config['num_hidden_layers']}."
    kept = {name: t for name, t in load_file(to / "model.safetensors").items() if not name.startswith(last)}
    save_file(kept, to / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_example_runs(page: Path, desk: Path, request: pytest.FixtureRequest) -> None:
    if page.stem != "README":  # the front page is run as it stands
        request.getfixturevalue("few")
    for language, content in blocks(page):
        if language == "console":
            for words in commands(content):
                if words[0] == "hfquant":
                    run(words)
        elif language == "python":
            exec(compile(content, page.name, "exec"), {"__name__": "example"})
        elif language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", content)
            assert name, "a YAML example begins with its file name, so that commands can use it"
            (desk / name[1]).write_text(content)


def test_every_other_command_is_a_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for language, content in blocks(page):
            for words in commands(content) if language == "console" else ():
                assert words[0] == "hfquant" or (words[0] == "make" and set(words[1:]) <= targets), words


def test_every_method_has_a_page() -> None:
    for name in methods.NAMES:
        page = (ROOT / "docs" / f"{name}.md").read_text()
        for part in ("What it does", "Why", "When not", "Options", "Example", "Paper"):
            assert f"\n## {part}\n" in page, f"docs/{name}.md lacks a section `{part}`"
        assert f"<!-- options: {name} -->" in page
        assert f"{name}.md" in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_say_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text), "run `python -m tests.test_docs`, and look at what it changes"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_the_changelog_knows_the_version() -> None:
    from hfquant import __version__

    assert __version__ in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", __version__)


def with_tables(text: str) -> str:
    """The page with its generated tables written anew."""
    return TABLE.sub(lambda found: f"{found[0].splitlines()[0]}\n{table(found[1], found[2])}", text)


def table(kind: str, name: str | None) -> str:
    if kind == "presets":
        rows = [(f"`{preset}`", str(read_file(path)["description"])) for preset, path in presets().items()]
        return _markdown(("name", "for"), rows)
    keys = {"recipe": Recipe, "activations": ActivationSpec, "kv_cache": CacheSpec}
    model = keys[kind] if kind in keys else methods.load(str(name))
    rows = []
    for key, field in model.model_fields.items():
        assert field.description, f"`{key}` has no description"
        default = None if field.is_required() else _value(field.get_default(call_default_factory=True))
        rows.append((f"`{key}`", f"`{default}`" if default else "required", field.description))
    return _markdown(("key" if kind in keys else "option", "default", "meaning"), rows)


def _value(value: object) -> str:
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return yaml.safe_dump(dump(mode="json"), default_flow_style=True, width=200, sort_keys=False).strip()
    return json.dumps(value)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := with_tables(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(os.path.relpath(page), file=sys.stderr)
