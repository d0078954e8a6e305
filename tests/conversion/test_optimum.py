"""optimum's two doors: its command line, and its class with GPTQConfig's names."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands, main
from optimum.quantization_base import OptimumQuantizer
from transformers import GPTQConfig

from hfquant.cli import app
from hfquant.conversion.optimum import HfquantQuantizer, recipe_of
from hfquant.errors import CalibrationError, QualityError, RecipeError
from hfquant.recipe import Recipe
from optimum.commands.register.register_hfquant import NAMES, HfquantGroup


def test_optimum_finds_the_commands_and_they_exist() -> None:
    assert (HfquantGroup, None) in load_optimum_namespace_cli_commands()
    ours = {command.name for command in app.registered_commands}
    assert set(NAMES) <= ours


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["recipes", "gptq-w4g64"], 0, "group_size: 64"),
        (["compress", "--recipe", "rtn-w4", "./none", "-o", "x"], 2, "none does not exist"),
        (["compress", "--help"], 0, "--calibration"),
        (["eval", "--help"], 0, "--tasks"),
        (["push", "--help"], 0, "--pr"),
        (["diagnose", "--help"], 0, "--beside"),
        (["inspect", "--json", "nothing"], 2, "is not a compressed model"),
    ],
)
def test_commands_get_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "hfquant", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert says in said.out + said.err


def test_gptq_config_is_understood() -> None:
    config = GPTQConfig(bits=3, group_size=32, desc_act=False, sym=False, damp_percent=0.05, model_seqlen=64)
    recipe = recipe_of(config)
    assert (recipe.grid.bits, recipe.grid.group_size, recipe.grid.symmetric) == (3, 32, False)
    assert recipe.calibration.seq_len == 64
    expected = Recipe.parse("gptq-w3g32asym", ["gptq.damp=0.05", "gptq.act_order=false", "calibration.seq_len=64"])
    assert recipe.hash == expected.hash


def test_only_these_modules() -> None:
    recipe = recipe_of(
        {
            "bits": 4,
            "block_name_to_quantize": "model.layers",
            "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
        }
    )
    assert recipe.grid_for("model.layers.0.self_attn.q_proj") is not None
    assert recipe.grid_for("model.layers.12.mlp.down_proj") is not None
    assert recipe.grid_for("model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bits": 4, "speed": 9},
        {"bits": 4, "dataset": "c4"},
        {"bits": 4, "dataset": ["a"]},
        {"bits": 4, "format": "x"},
    ],
)
def test_what_cannot_be_said_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(config)
    assert refused.value.hint


@pytest.mark.usefixtures("few")
def test_quantizer(built: Callable[[str], Path], tmp_path: Path) -> None:
    quantizer = HfquantQuantizer.from_pretrained(built("llama"))
    assert isinstance(quantizer, OptimumQuantizer)
    report = quantizer.quantize(tmp_path / "out", recipe="rtn-w8")
    assert report["evaluation"]["top1_agreement"] > 0.9
    assert (tmp_path / "out" / "config.json").is_file()
    strict = Recipe.parse("rtn-w2", ["gate.max_kl=1e-9"])
    with pytest.raises(QualityError):
        quantizer.quantize(tmp_path / "bad", recipe=strict)
    with pytest.raises(RecipeError):
        quantizer.quantize(tmp_path / "none", recipe="rtn-w8", bits=4)


def test_the_text_that_it_is_measured_on(built: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a story of a lion and a road. " * 200)
    quantizer = HfquantQuantizer.from_pretrained(built("llama"))
    report = quantizer.quantize(tmp_path / "out", recipe="rtn-w8", text=tmp_path / "mine.txt")
    assert report["evaluation"]["settings"]["text"] == "mine.txt"
    (tmp_path / "short.txt").write_text("a lion")
    for name in ("missing.txt", "short.txt"):
        with pytest.raises(CalibrationError):
            quantizer.quantize(tmp_path / "none", recipe="rtn-w8", text=tmp_path / name)
    assert not (tmp_path / "none").exists()
