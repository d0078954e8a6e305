"""hfquant.json: from what, how, with what and to what a published checkpoint was made, and the hash of every file.

Whoever finds the repository can repeat the work; a program can tell in one request whether it is up to date.  Two
pushes of the same folder give the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe

SCHEMA = 1
FILE = "hfquant.json"
METRICS = ("perplexity", "reference_perplexity", "kl", "top1_agreement", "tokens_per_second", "settings")


def provenance(report: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """The document.  report: as it is published.  files: path -> (size, sha256) of all other files."""
    source, evaluation = report.get("source") or {}, report.get("evaluation") or {}
    compression, calibration = report.get("compression") or {}, report.get("calibration")
    recipe = report.get("recipe")
    return {
        "schema": SCHEMA,
        "key": key(report),
        "base": {name: source.get(name) for name in ("id", "revision", "license", "gated", "private")},
        "recipe": recipe and {"hash": recipe_hash(recipe), **recipe},
        "calibration": calibration,
        "versions": compression.get("versions") or evaluation.get("versions") or {"hfquant": report.get("hfquant")},
        "hardware": compression.get("hardware") or evaluation.get("hardware"),
        "metrics": {name: evaluation[name] for name in METRICS if name in evaluation},
        "gate": report.get("gate"),
        "files": [{"path": path, "size": size, "sha256": sha256} for path, (size, sha256) in sorted(files.items())],
    }


def key(report: Mapping[str, Any]) -> str:
    """64 hex digits that name this conversion: equal base, recipe, calibration and hfquant give an equal key."""
    source, recipe = report.get("source") or {}, report.get("recipe")
    parts = {
        "base": [source.get("id"), source.get("revision")],
        "recipe": recipe and recipe_hash(recipe),
        "calibration": (report.get("calibration") or {}).get("sha256"),
        "hfquant": ".".join(str(report.get("hfquant")).split(".")[:2]),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """`Recipe.hash`; of a recipe that this version does not know, the hash of its text."""
    try:
        return Recipe.parse(recipe).hash
    except RecipeError:
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
