"""What a request would cost and give, put together before anything is done."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..errors import (
    CalibrationError,
    FormatError,
    HfquantError,
    HubError,
    LimitError,
    RecipeError,
    RequestError,
    ResourceError,
    SourceError,
    TokenError,
)  # fmt: skip
from ..model.remote import Look, Tensors
from ..recipe import Recipe
from . import checks
from .access import Target
from .executors.hf_jobs import hardware, price
from .expected import expected
from .facts import ModelFacts, Preview, Problem, Runtime
from .planner import Planner
from .request import Request
from .retry import understood as hub_understood
from .settings import Settings
from .slices import FETCHING, Piece, fetch
from .survey import Survey

KINDS: dict[type[HfquantError], str] = {
    RecipeError: "recipe", FormatError: "recipe", CalibrationError: "recipe", RequestError: "target",
    HubError: "target", TokenError: "token", LimitError: "limit", ResourceError: "memory", SourceError: "missing",
}  # fmt: skip
WORDS = {"pickled": "pickle", "gated": "gated", "damaged": "damaged", "own modelling code": "code"}
STANDARD = {
    "compressed_tensors": "the compressed-tensors package",
    "gptq": "the gptqmodel package",
}


class Previewer:
    """Asks the Hub and the planner; changes nothing."""

    def __init__(self, settings: Settings, planner: Planner) -> None:
        self._settings, self._planner, self._survey = settings, planner, Survey()

    def inspect(self, model: str, revision: str, token: str | bool | None) -> ModelFacts:
        """Raises SourceError."""
        seen, config, tensors = self._survey.see(model, revision, token)
        return checks.describe(seen, config, tensors)

    def __call__(self, request: Mapping[str, Any] | Request, token: str | bool | None) -> Preview:
        found = _Findings()
        wish: Request | None = None
        recipe: Recipe | None = None
        with found.caught("recipe"):
            wish = Request.parse(request)
        if wish is None:
            return found.preview(None, None)
        with found.caught("recipe"):
            recipe = wish.chosen()
            found.recipe = recipe.model_dump(mode="json")
        with found.caught("missing"):
            seen, config, tensors = self._survey.see(wish.model, wish.revision, token)
            found.model = checks.describe(seen, config, tensors)
            found.problems += checks.problems(seen, config, tensors, self._settings.limits, wish)
            if recipe is not None and (long := checks.too_long(config, recipe)):
                found.problems.append(long)
            if recipe is not None and not any(problem.blocks for problem in found.problems):
                self._lay_out(found, recipe, seen, config, tensors)
        target = None
        if wish.target is not None and token is not False:
            with found.caught("target"):
                target = checks.target(wish, token)
        if wish.executor == "hf-jobs":
            with found.caught("money"):
                self._pay(found, wish, token)
        elif wish.executor == "local":
            self._fits(found)
        return found.preview(wish, target)

    def _lay_out(
        self, found: "_Findings", recipe: Recipe, seen: Look, config: Mapping[str, Any], tensors: Tensors
    ) -> None:
        with found.caught("recipe"):
            found.laid = self._laid(recipe, seen, config, tensors)

    def _laid(self, recipe: Recipe, seen: Look, config: Mapping[str, Any], tensors: Tensors) -> Mapping[str, Any]:
        key = (seen.commit, recipe.hash, str(recipe.calibration.samples * recipe.calibration.seq_len))
        return self._planner.ask(key, seen.model, config, tensors, recipe.model_dump(mode="json"))

    def block(self, request: Mapping[str, Any] | Request, token: str | bool | None) -> list[Piece]:
        """The weights of one block.  Raises the first thing that stands in the way."""
        wish, until = Request.parse(request), time.monotonic() + FETCHING
        recipe = wish.chosen()
        with hub_understood():
            seen, config, tensors = self._survey.see(wish.model, wish.revision, token, until)
            for found in checks.problems(seen, config, tensors, self._settings.limits, wish):
                if found.blocks and found.kind != "license":
                    raise SourceError(found.message, found.hint)
            if recipe.budget is not None:
                raise RecipeError("the grids of a budget are chosen in the conversion", "choose a recipe by its name")
            middle = self._laid(recipe, seen, config, tensors)["middle"]
            return fetch(seen, tensors, middle, token, until=until)

    def _pay(self, found: "_Findings", wish: Request, token: str | bool | None) -> None:
        limits = self._settings.limits
        most = min(wish.max_usd or math.inf, limits.usd)
        seconds = float(min(wish.timeout or math.inf, limits.seconds))
        found.usd, _ = price(hardware(token), wish.hardware, seconds, most)

    def _fits(self, found: "_Findings") -> None:
        """Whether this machine, or one like it, has what the work takes."""
        limits, laid = self._settings.limits, found.laid
        if not laid or found.model is None:
            return
        memory = limits.memory or psutil.virtual_memory().total * 3 // 4
        disk = found.model.bytes + laid["disk"]
        free = shutil.disk_usage(_existing(self._settings.folder)).free
        for kind, needed, most, unit in (
            ("memory", laid["memory"], memory, "memory"),
            ("disk", disk, min(limits.disk, free), "disk"),
        ):
            if needed > most:
                said = f"about {needed / 1e9:,.1f} GB of {unit} are needed, {most / 1e9:,.1f} GB may be used"
                found.problems.append(Problem(kind, said, "take a smaller model", blocks=True))
        if laid["seconds"] > limits.seconds:
            said = (
                f"it would take about {laid['seconds'] / 3600:,.1f} h here, {limits.seconds / 3600:,.1f} h are allowed"
            )
            hint = "take a quicker recipe, or other hardware (`executor: hf-jobs`)"
            found.problems.append(Problem("time", said, hint, blocks=False))


class _Findings:
    def __init__(self) -> None:
        self.model: ModelFacts | None = None
        self.recipe: Mapping[str, Any] | None = None
        self.laid: Mapping[str, Any] = {}
        self.usd: float | None = 0.0
        self.problems: list[Problem] = []

    @contextmanager
    def caught(self, kind: str) -> Iterator[None]:
        """What goes wrong within becomes a problem of that kind, or of the one that its error stands for."""
        try:
            with hub_understood():
                yield
        except HfquantError as error:
            named = KINDS.get(type(error), kind)
            if named == "missing":
                named = next((word for text, word in WORDS.items() if text in error.message), named)
            self.problems.append(Problem(named, error.message, error.hint))

    def _seconds(self, wish: Request | None) -> tuple[float, float] | None:
        """Of other machines nothing is known."""
        if not self.laid or wish is None or self.model is None or wish.executor != "local":
            return None
        pushed = 0 if wish.target is None else int(self.laid["bytes_after"])
        return expected(self.laid["seconds"], self.model.bytes, pushed)

    def preview(self, wish: Request | None, target: Target | None) -> Preview:
        laid, model = self.laid, self.model
        private = None if wish is None or wish.target is None else wish.private
        if wish is not None and wish.target is not None and private is None and model is not None:
            private = bool(model.private or model.gated)
        return Preview(
            model=model,
            recipe=self.recipe,
            target=wish.target if wish else None,
            exists=target.exists if target else None,
            private=target.private if target and target.exists else private,
            format=laid.get("format"),
            bits_per_weight=laid.get("bits_per_weight"),
            bytes_before=model.bytes if model else None,
            bytes_after=laid.get("bytes_after"),
            memory=laid.get("memory"),
            disk=laid["disk"] + model.bytes if laid and model else None,
            seconds=self._seconds(wish),
            usd=self.usd,
            runtimes=runtimes(laid["format"]) if laid else (),
            problems=tuple(self.problems),
        )


def runtimes(name: str) -> tuple[Runtime, ...]:
    """Which programs load a checkpoint in that format."""
    if name in STANDARD:
        return (
            Runtime("hfquant", True, "weights stay packed in memory"),
            Runtime("transformers", True, f"with {STANDARD[name]}"),
            Runtime("vLLM", True, "on the hardware that its kernels support"),
        )
    only = "does not know this format, which holds what no standard one says: sparsity, low rank, odd widths or groups"
    return (
        Runtime("hfquant", True, "weights stay packed in memory"),
        Runtime("transformers", True, "with `import hfquant` before it loads"),
        Runtime("vLLM", False, only),
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
