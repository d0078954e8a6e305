"""Sizes and times as people write them."""

import pytest

from hfquant.cli.units import between, count, duration, read_size, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("700MB", 700_000_000),
        ("2GiB", 2 * 1024**3),
        ("1.5g", 1_500_000_000),
        ("4 kib", 4096),
        ("1000000", 1_000_000),
        ("8B", 8),
        (".5T", 500_000_000_000),
    ],
)
def test_read_size(text: str, expected: int) -> None:
    assert read_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "0", "7q", "1e9", "2 G B", "1.2.3M"])
def test_read_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"as a size; write 700MB or 2GiB"):
        read_size(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.54 kB"),
        (163_400_000, "163 MB"),
        (999_600_000, "1000 MB"),
        (6.7e9, "6.7 GB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text


def test_count() -> None:
    assert [count(n) for n in (12, 134_515_008, 6_738_415_616)] == ["12", "135 M", "6.74 B"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (130, "2 min 10 s"),
        (3599.7, "1 h 00 min"),
        (11100, "3 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(12, 47, "10 s to 45 s"), (41, 61, "40 s to 1 min"), (118, 700, "2 min to 10 min"), (1, 2, "5 s"),
     (3500, 9000, "1 h to 2 h 30 min")],
)  # fmt: skip
def test_between(low: float, high: float, text: str) -> None:
    assert between(low, high) == text
