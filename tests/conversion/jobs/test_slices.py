"""One block of a model on the Hub, rounded: its bytes alone are fetched, and the errors are those of its grids."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hfquant.conversion import preview, retry, slices
from hfquant.conversion.slices import Piece, fetch, rounded
from hfquant.errors import HfquantError, LimitError, RecipeError, SourceError
from hfquant.methods import load
from hfquant.model import remote
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.hub.fixtures import TOKENS

from .conftest import Desk
from .test_hostile import remote_code

WISH = {"model": "alice/model", "recipe": "rtn-w4g32"}


def pieces(desk: Desk, **wish: Any) -> list[Piece]:
    return desk.service.block(WISH | wish, TOKENS["alice"])


def test_the_middle_block_and_nothing_else_is_fetched(desk: Desk, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives are the bytes of the file; all that was asked for are the headers and those."""
    parts: list[int] = []
    get = remote._get

    def counted(seen: Any, name: str, token: Any, start: int | None = None, *more: Any) -> bytes:
        if start:  # a header is at the start
            parts.append(more[0])
        return get(seen, name, token, start, *more)

    monkeypatch.setattr(remote, "_get", counted)
    stored, found = load_file(model / "model.safetensors"), pieces(desk)
    assert [piece.name.split(".")[2] for piece in found] == ["1"] * 7, "of three blocks"
    for piece in found:
        arrived = torch.frombuffer(bytearray(piece.content), dtype=torch.float32).view(piece.shape)
        assert arrived.equal(stored[piece.name])
    assert parts == [len(piece.content) for piece in found]


def test_errors_are_those_of_rounding_to_nearest(desk: Desk, model: Path) -> None:
    stored, found = load_file(model / "model.safetensors"), pieces(desk)
    errors = {one.name: one for one in rounded(found)}
    assert list(errors) == [piece.name for piece in found]
    for name, one in errors.items():
        W = stored[name].float()
        made = load("rtn")()(Layer(name=name, W=W), Grid(4, 32, True), torch.float16)
        assert made.Q is not None
        expected = float((W - made.Q.dequantize()).norm() / W.norm())
        assert (one.error, one.shape, one.grid) == (pytest.approx(expected, rel=1e-4), tuple(W.shape), "w4g32sym")
    coarse, fine = (rounded(pieces(desk, recipe=name)) for name in ("rtn-w3g32", "rtn-w8g32"))
    for low, middle, high in zip(coarse, errors.values(), fine, strict=True):
        assert low.error > middle.error > high.error > 0


def piece(W: Tensor, **changes: Any) -> Piece:
    content = W.contiguous().view(torch.uint8).numpy().tobytes()
    shape = (W.shape[0], W.shape[1])
    return replace(Piece("h.0.w", "BF16", shape, content, vars(Grid(4, 16, True)), False), **changes)


def test_a_transposed_weight_is_turned_before_its_groups_are_formed() -> None:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (straight,), (turned,) = rounded([piece(W)]), rounded([piece(W.T.contiguous(), transposed=True)])
    assert (turned.error, turned.shape) == (straight.error, (24, 64))
    (otherwise,) = rounded([piece(W.T.contiguous())])
    assert otherwise.error != straight.error


def test_zeros_have_no_error() -> None:
    assert rounded([piece(torch.zeros(4, 16).bfloat16())])[0].error == 0


def test_a_recipe_that_keeps_attention_rounds_the_rest(desk: Desk) -> None:
    found = pieces(desk, recipe={"steps": [{"method": "rtn"}], "grid": "w4g32", "keep": ["@attention"]})
    assert sorted(p.name.split(".")[-2] for p in found) == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("wish", "kind", "words"),
    [
        ({"recipe": {"steps": [{"method": "gptq"}], "budget": {"fit": "150 kB"}}}, RecipeError, "of a budget"),
        ({"recipe": "sparsegpt-50", "changes": ["calibration.seq_len=64"]}, RecipeError, "rounds no matrix"),
        ({"recipe": "rtm-w4"}, RecipeError, "unknown method `rtm`"),
        ({"model": "alice/none"}, SourceError, "not on the Hub"),
        ({"model": "../x"}, HfquantError, "namespace/name"),
    ],
)
def test_what_cannot_be_looked_at_is_said(desk: Desk, wish: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        pieces(desk, **wish)


def test_what_a_conversion_would_refuse_is_refused(desk: Desk, model: Path) -> None:
    remote_code(model)
    desk.hub.store.upload("alice/model", model)
    with pytest.raises(SourceError, match="own modelling code"):
        pieces(desk)
    desk.hub.store.upload("alice/private", model, private=True)
    with pytest.raises(SourceError, match="not on the Hub, or private"):
        desk.service.block(WISH | {"model": "alice/private"}, TOKENS["bob"])


def test_a_block_that_is_too_large_or_called_otherwise(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _, tensors = desk.service._preview._survey.see("alice/model", "main", TOKENS["alice"])
    middle = [{"name": "model.layers.1.mlp.up_proj.weight", "kind": "linear", "grid": vars(Grid(4, 32, True))}]
    with pytest.raises(LimitError, match="0 MB, at most 0 are looked at"):
        fetch(seen, tensors, middle, TOKENS["alice"], most=1000)
    with pytest.raises(SourceError, match="otherwise"):
        fetch(seen, tensors, [{**middle[0], "name": "transformer.h.1.w"}], TOKENS["alice"])
    get = remote._get
    monkeypatch.setattr(remote, "_get", lambda *given: get(*given)[: -1 if given[3] else None])
    with pytest.raises(SourceError, match="did not arrive in the part"):
        fetch(seen, tensors, middle, TOKENS["alice"])
    assert slices.MOST > 440_000_000, "a block of Llama 3 8B in 16 bit"


def test_a_weight_that_is_not_there_is_not_left_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _, tensors = desk.service._preview._survey.see("alice/model", "main", TOKENS["alice"])
    name = "model.layers.1.mlp.up_proj.weight"
    one = {"name": name, "kind": "linear", "grid": vars(Grid(4, 32, True))}
    two = {**one, "name": name.replace("up", "down")}
    with pytest.raises(SourceError, match=r"otherwise: they have no .*nowhere"):
        fetch(seen, tensors, [one, {**one, "name": "nowhere"}], TOKENS["alice"])
    for wrong in (("F4", tensors[name][1]), ("F32", (4, 4, 4)), ("F32", (4,))):
        with pytest.raises(SourceError, match=f"{name} of alice/model is no matrix of numbers"):
            fetch(seen, {**tensors, name: wrong}, [one], TOKENS["alice"])
    for wrong in (("F32", (0, 2**70)), ("F32", (4, 4))):
        with pytest.raises(SourceError, match=f"{name} of alice/model is empty, or is in its files twice"):
            fetch(seen, {**tensors, name: wrong}, [one, two], TOKENS["alice"])
    read = slices.read_tensors
    monkeypatch.setattr(slices, "read_tensors", lambda seen, names, *given, **more: read(seen, {name}, *given, **more))
    with pytest.raises(SourceError, match=r"down_proj.* is empty"):
        fetch(seen, tensors, [one, two], TOKENS["alice"])


def test_a_hub_that_is_busy_is_not_asked_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next visitor waits for it too."""
    waits: list[float] = []
    monkeypatch.setattr(retry, "sleep", waits.append)
    desk.hub.faults.add("busy", times=100)
    monkeypatch.setattr(preview, "FETCHING", 0.5)
    with pytest.raises(SourceError, match="429 Too Many"):
        pieces(desk)
    assert waits == [], "the first wait would have been a second"
    monkeypatch.setattr(preview, "FETCHING", 120.0)
    with pytest.raises(SourceError, match="429 Too Many"):
        pieces(desk)
    assert len(waits) == retry.TRIES - 1
