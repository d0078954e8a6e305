"""A fleet's file: strict, complete, and clear about what is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hfquant.conversion.fleet.manifest import read_manifest
from hfquant.errors import FleetError, HfquantError

GOOD: dict[str, Any] = {
    "version": 1,
    "defaults": {
        "namespace": "acme", "executor": "hf-jobs", "flavor": "a10g-small", "timeout": "2h", "max_usd": 3, "push": "pr",
    },
    "recipes": {"gptq4": "recipes/mine.yaml", "sq8": "smoothquant-w8a8"},
    "models": [
        {"id": "org/model", "recipes": ["gptq4", "sq8"], "gates": {"max_ppl_ratio": 1.05}},
        {
            "search": {"author": "org", "pipeline": "text-generation", "max_params": 8e9},
            "recipes": ["gptq4"], "limit": 20,
        },
    ],
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "mine.yaml").write_text("steps: [{method: gptq}]\ngrid: w4g128\n")
    (folder / "fleet.yaml").write_text(yaml.safe_dump(GOOD | changes))
    return folder / "fleet.yaml"


def test_a_whole_one(tmp_path: Path) -> None:
    found = read_manifest(write(tmp_path))
    assert found.recipe("gptq4").grid.group_size == 128
    assert found.recipe("rtn-w8").grid.bits == 8, "presets and shorthand need no entry"
    assert found.target("acme", "org/model", "gptq4") == "acme/model-gptq4"
    assert found.target("acme", "org/m", "sparsegpt-2of4+gptq-w4g128") == "acme/m-sparsegpt-2of4-gptq-w4g128"
    terms = found.models[0].over(found.defaults)
    assert (terms.timeout, terms.push, terms.gates.max_ppl_ratio) == (7200, "pr", 1.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modles": []}, "did you mean `models`"),
        ({"version": 2}, "version"),
        ({"models": []}, "models"),
        ({"models": [{"id": "org/model", "recipes": ["gqtp-w4g64"]}]}, "gptq"),
        ({"models": [{"id": "../etc", "recipes": ["rtn-w8"]}]}, "namespace/name"),
        ({"models": [{"recipes": ["rtn-w8"]}]}, "`id` or `search`"),
        ({"models": [{"search": {}, "recipes": ["rtn-w8"]}]}, "author"),
        ({"models": [{"id": "org/model", "recipes": []}]}, "recipes"),
        ({"output": "{namespace}/{name}"}, "{recipe}"),
        ({"output": "{namespace}/{name}-{recipe}-{secret}"}, "{secret}"),
        ({"defaults": {}}, "namespace"),
        ({"defaults": {"namespace": "acme", "max_usd": 3}}, "hf-jobs"),
        ({"defaults": {"namespace": "acme", "timeout": "soon"}}, "timeout"),
        ({"recipes": {"gptq4": "recipes/none.yaml"}}, "none.yaml"),
        ({"output": "{namespace}/{name}--{recipe}"}, "namespace/name"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((HfquantError, ValueError)) as error:
        read_manifest(write(tmp_path, **changes))
    assert said in str(error.value)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="cannot be read"):
        read_manifest(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("version: [1")
    with pytest.raises(FleetError, match="not YAML"):
        read_manifest(tmp_path / "bad.yaml")
