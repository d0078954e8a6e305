"""Crews by name."""

import sys

import pytest

from hfquant.compress.crew import ALONE, PARTS, Devices
from hfquant.compress.crews import crew_of
from hfquant.errors import ResourceError


def test_nobody_and_devices() -> None:
    assert crew_of(None) is ALONE
    pair = crew_of("cpu,cpu", parts=4)
    assert isinstance(pair, Devices)
    assert (pair.parts, pair.device) == (4, "cpu")
    assert crew_of("cpu").parts == PARTS


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (None, {"parts": 4}, "add `--crew`"),
        ("cpu,cpu", {"threads": 2}, "leave it out"),
        ("gpu9", {}, "use `cpu`"),
        ("cpu,cuda:0", {}, "no CUDA device"),
        ("cpu", {"parts": 1}, "work alone"),
        ("ray", {}, "hfquant[ray]"),
    ],
)
def test_what_cannot_be_is_said(
    name: str | None, settings: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError) as error:
        crew_of(name, **settings)  # type: ignore[arg-type]
    assert said in str(error.value)
