"""What a child of the sandbox can do: compress, evaluate, and say beforehand what a compression would give."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from .. import report
from ..budget import open_case, table_of
from ..budget.decide import check
from ..budget.door import outline, outlined
from ..budget.promise import reach
from ..compress import Plan, compress, plan
from ..compress.estimate import LIBRARIES, forward_seconds
from ..compress.layout import Layout, fit, lay_out
from ..compress.rewriting import rewritten
from ..errors import HfquantError
from ..measure.diagnose import diagnose
from ..measure.tally import Tally
from ..measure.verify import verify
from ..model.headers import DTYPES, TensorInfo
from ..model.source import Source, open_config, open_source
from ..recipe import Recipe
from .child import Tell, explained

BUDGETED = 2  # times as long: the model is looked at first, and measured twice
MATRICES = ("linear", "conv1d")  # of a block; the ends of the model and fused experts are others
EVALUATED = 2 * 64 * 512  # tokens that the two models see in an evaluation, usually


def _source(task: Mapping[str, Any]) -> Source:
    """The original in the job's folder, under the name that it has on the Hub."""
    opened = open_source(Path(task["source"]))
    return replace(opened, id=task["model"], revision=task["revision"], facts=task["facts"])


def do_compress(task: Mapping[str, Any], tell: Tell, _: IO[bytes]) -> dict[str, Any]:
    """task: source, out, model, revision, facts, recipe, memory, text (a file, or None); measuring, for a budget."""
    out, recipe = Path(task["out"]), Recipe.parse(task["recipe"])
    known = report.read(out)
    finished = "output" in known and not (out / ".hfquant").exists()  # and nobody lived to hear it
    if finished and (recipe.budget is None or "budget" in known):
        return {"resumed": True}
    source = _source(task)
    text = {} if task["text"] is None else {"calibration": task["text"]}

    def done(chosen: Recipe, fresh: bool) -> None:
        _layers(plan(source, chosen, out, max_memory=task["memory"], fresh=fresh or finished, **text), tell)
        if recipe.budget is not None:
            verify(out, against=source, enforce=False, **task["measuring"])

    if recipe.budget is None:
        done(recipe, False)
    else:
        case = open_case(source, recipe, out, fresh=finished, **text)
        reach(case, table_of(case), done)
    return {"resumed": False}


def _layers(todo: Plan, tell: Tell) -> None:
    expected = todo.estimate
    tell({
        "event": "plan", "layers": len(todo.layers), "blocks": todo.blocks, "resumed": todo.resumed,
        "bytes_after": expected.bytes_after, "peak_memory": expected.peak_memory, "disk": expected.disk,
        "seconds": expected.seconds,
    })  # fmt: skip
    tally = Tally(todo.layers, todo.resumed)
    for layer in compress(todo):
        tally.add(layer)
        tell({
            "event": "layer", "name": layer.name, "block": layer.block, "blocks": layer.blocks, "error": layer.error,
            "bytes_before": layer.bytes_before, "bytes_after": layer.bytes_after, "grid": str(layer.grid),
            "notes": list(layer.notes), "share": tally.weights_done / max(1, tally.weights), "eta": tally.eta,
            "layers_done": tally.done, "layers": tally.layers, "blocks_done": tally.blocks_done,
        })  # fmt: skip


def do_evaluate(task: Mapping[str, Any], tell: Tell, _: IO[bytes]) -> dict[str, Any]:
    """Reload, measure, write report and card.  task: source, out, model, revision, facts, measuring."""
    out, source = Path(task["out"]), _source(task)
    known = report.read(out)
    report.merge(out, source={**known.get("source", {}), **task["facts"]})
    diagnose(out, look=False)  # figures from the report alone; before the card is written for the last time
    done = verify(out, against=source, enforce=False, **task["measuring"])
    return {"passed": (done.get("gate") or {}).get("passed")}


def do_layouts(task: Mapping[str, Any], tell: Tell, heard: IO[bytes]) -> dict[str, Any]:
    """Answer questions until there are no more; each is a line, and so is its answer.

    A question: name, config (a dict), tensors (name -> [type, shape]), recipe, memory.
    """
    torch.set_num_threads(1)
    while line := heard.readline():
        question = json.loads(line)
        try:
            tell({"event": "layout", "id": question["id"], **_layout(question)})
        except HfquantError as error:
            tell({"event": "layout", "id": question["id"], "problem": explained(error)})
        except Exception as error:  # a config can be wrong in ways that transformers never thought of
            told = {"kind": "SourceError", "message": f"no model can be built from this config: {error}", "hint": None}
            tell({"event": "layout", "id": question["id"], "problem": told})
    return {}


def _layout(question: Mapping[str, Any]) -> dict[str, Any]:
    recipe = Recipe.parse(question["recipe"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(question["config"]))
        config = open_config(path, question["name"])
        tensors = {
            name: TensorInfo(path, 0, DTYPES[kind], tuple(shape)) for name, (kind, shape) in question["tensors"].items()
        }
        source = Source(question["name"], None, path, config, tensors, ())
        every = recipe if recipe.budget is None else outlined(recipe)
        laid = lay_out(rewritten(source, every, outline=True), every)
        least = _least(laid, recipe)
    shape = recipe.calibration.samples, recipe.calibration.seq_len
    tokens = torch.empty(shape, dtype=torch.int64, device="meta") if recipe.needs_calibration else None
    _, _, expected = fit(laid, every, tokens, question["memory"])
    seconds = (expected.seconds or 0.0) + forward_seconds(source.parameters, EVALUATED, laid.skeleton.dtype)
    weights = sum(layer.bytes_after for layer in laid.layers.values())
    count = sum(_parameters(laid, name) for name in laid.layers)
    return {
        "format": laid.wire.format,
        "layers": len(laid.layers),
        "bits_per_weight": 8 * weights / count if least is None else None,
        "bytes_before": expected.bytes_before,
        "bytes_after": expected.bytes_after if least is None else least,
        "memory": max(expected.peak_memory, LIBRARIES + 2 * expected.bytes_after),
        "disk": expected.disk,
        "seconds": seconds * (1 if least is None else BUDGETED),
        "grids": sorted({str(layer.grid) for layer in laid.layers.values()}),
        "middle": _middle(laid),
    }


def _middle(laid: Layout) -> list[dict[str, Any]]:
    """The matrices that are rounded in the middle one of the blocks, and onto which grids."""
    rounded = [layer for layer in laid.layers.values() if layer.kind in MATRICES and not layer.grid.is_float]
    blocks = sorted({layer.block for layer in rounded})
    return [
        {"name": layer.name, "kind": layer.kind, "grid": vars(layer.grid)}
        for layer in rounded
        if layer.block == blocks[len(blocks) // 2]
    ]


def _least(laid: Layout, recipe: Recipe) -> int | None:
    """Bytes of what a budget leads to, as far as that is known: what it names, else the least that there could be.

    Raises RecipeError for a budget that cannot be met.
    """
    if recipe.budget is None:
        return None
    table = outline(laid, recipe)
    check(table, recipe.budget)
    room = recipe.budget.fit or recipe.budget.within
    return room or table.rest + sum(min(option.nbytes for option in row.options) for row in table.rows)


def _parameters(laid: Layout, name: str) -> int:
    return laid.skeleton.model.get_parameter(name).numel()


TASKS: dict[str, Callable[[Mapping[str, Any], Tell, IO[bytes]], dict[str, Any]]] = {
    "compress": do_compress,
    "evaluate": do_evaluate,
    "layouts": do_layouts,
}
