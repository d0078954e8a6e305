"""Progress: an honest estimate from the first block on, and no bar where nobody watches."""

import io

from rich.console import Console

from hfquant.cli.progress import Tally, progress

from .conftest import layer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_eta_comes_with_the_end_of_the_first_block_and_is_by_weight() -> None:
    clock = Clock()
    layers = [layer(0, "up"), layer(0, "down"), layer(1, "up"), layer(2, "up", shape=(192, 64))]
    tally = Tally({found.name: found for found in layers}, clock=clock)
    assert str(tally) == "preparing"
    clock.now = 10.0
    assert tally.add(layers[0]) is False
    assert tally.eta is None, "half a block tells little"
    clock.now = 20.0
    assert tally.add(layers[1]) is False
    assert tally.eta == 40.0  # twice as much is left as was done
    assert str(tally) == "block 1/3  error 0.05  left 40 s"
    clock.now = 30.0
    assert tally.add(layers[2]) is True
    assert tally.eta == 30.0
    clock.now = 60.0
    tally.add(layers[3])
    assert (tally.eta, tally.weights_done) == (0.0, tally.weights)


def test_what_an_earlier_run_did_is_no_measure_of_speed() -> None:
    clock = Clock()
    layers = [layer(block, "up", blocks=4) for block in range(4)]
    tally = Tally({found.name: found for found in layers}, resumed=2, clock=clock)
    for found in layers[:2]:  # told again at once
        tally.add(found)
    assert tally.eta is None
    clock.now = 30.0
    tally.add(layers[2])
    assert tally.eta == 30.0
    clock.now = 50.0
    tally.add(layers[3])
    assert tally.eta == 0.0


def test_skipped_layers_of_an_earlier_run_count_as_done() -> None:
    layers = [layer(block, "up", blocks=3) for block in range(3)]
    tally = Tally({found.name: found for found in layers}, resumed=2)
    assert tally.weights_done == 2 * tally.weights // 3


def test_lines_in_a_log() -> None:
    text = io.StringIO()
    layers = [layer(block, leaf) for block in range(3) for leaf in ("up", "down")]
    with progress(Tally({found.name: found for found in layers}, clock=Clock()), Console(file=text)) as show:
        for found in layers:
            show(found)
    assert text.getvalue().splitlines() == [
        " 33%  block 1/3  error 0.05  left 0 s  (2 of 6 layers, 0 s)",
        " 67%  block 2/3  error 0.05  left 0 s  (4 of 6 layers, 0 s)",
        "100%  block 3/3  error 0.05  left 0 s  (6 of 6 layers, 0 s)",
    ]


def test_bar_on_a_terminal() -> None:
    text = io.StringIO()
    layers = [layer(block, "up") for block in range(3)]
    console = Console(file=text, force_terminal=True, no_color=True, width=120)
    with progress(Tally({found.name: found for found in layers}, clock=Clock()), console) as show:
        for found in layers:
            show(found)
    assert "block 3/3  error 0.05" in text.getvalue()
    assert "100%" in text.getvalue()
    assert "\x1b[3" not in text.getvalue()  # no colour
