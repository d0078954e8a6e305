"""The command line without an engine: plans, layers and reports made up, to test the talking alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hfquant.cli import app, engine
from hfquant.tensors.grid import Grid

REPORT = {
    "schema": 1,
    "source": {"id": "org/model", "bytes": 269_000_000},
    "compression": {"seconds": 130.4, "peak_memory_bytes": 640_000_000},
    "output": {"bytes": 163_000_000},
    "evaluation": {
        "perplexity": 32.31,
        "reference_perplexity": 29.45,
        "kl": 0.09312,
        "top1_agreement": 0.8314,
        "tokens": 32704,
        "tokens_per_second": 21.04,
        "reference_tokens_per_second": 14.0,
    },
    "sample": {"prompt": "The sea", "original": "The sea is", "compressed": "The sea\nis"},
}


def layer(block: int, leaf: str, blocks: int = 3, **changes: Any) -> SimpleNamespace:
    facts = {"name": f"model.layers.{block}.{leaf}", "shape": (64, 64), "block": block, "blocks": blocks}
    return SimpleNamespace(**facts | {"error": 0.05, "grid": Grid(4, 64), "notes": (), "kind": "linear"} | changes)


@dataclass
class Engine:
    """What the commands asked for, and what they are to be given."""

    results: list[SimpleNamespace] = field(
        default_factory=lambda: [layer(block, leaf) for block in range(3) for leaf in ("up", "down")]
    )
    resumed: int = 0
    stop: BaseException | None = None  # raised after the second layer
    report: dict[str, Any] = field(default_factory=lambda: dict(REPORT))
    refusal: Exception | None = None  # raised by plan
    failure: Exception | None = None  # raised by judge
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def plan(
        self, model: str, recipe: Any, out: Path, announce: Callable[[SimpleNamespace], None], **settings: Any
    ) -> SimpleNamespace:
        self.asked.append(("plan", model, recipe.name, out, settings))
        if self.refusal:
            raise self.refusal
        estimate = SimpleNamespace(
            parameters=134_515_008,
            bytes_before=269_000_000,
            bytes_after=163_000_000,
            peak_memory=612_345_678,
            disk=420_000_000,
            seconds=118.0,
        )
        found = SimpleNamespace(
            recipe=recipe,
            out=out,
            estimate=estimate,
            measuring=lambda windows: SimpleNamespace(peak_memory=10_000_000 * windows, seconds=windows / 2),
            source=SimpleNamespace(),
            blocks=3,
            layers={found.name: found for found in self.results},
            resumed=self.resumed,
            wire=SimpleNamespace(format="compressed_tensors"),
        )
        announce(found)
        return found

    def layers(self, plan: SimpleNamespace) -> Iterator[SimpleNamespace]:
        for at, found in enumerate(self.results):
            if at == 2 and self.stop is not None:
                raise self.stop
            yield found

    def verify(self, out: Path, **settings: Any) -> dict[str, Any]:
        self.asked.append(("verify", out, settings))
        return self.report

    def judge(self, report: dict[str, Any]) -> None:
        if self.failure:
            raise self.failure


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    for name in ("plan", "layers", "verify", "judge"):
        monkeypatch.setattr(engine, name, getattr(made, name))
    return made


@pytest.fixture(autouse=True)
def quick(few: None) -> None:
    """What a command measures is tested with `verify`; here it is told."""


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run `hfquant ARGUMENTS`."""
    runner = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "100"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
