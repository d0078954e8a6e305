"""`import hfquant` is light, and enough; without it a native checkpoint fails loudly."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.quantizers import auto

import hfquant
from hfquant.errors import HfquantError
from hfquant.plugin import METHOD, HfQuantConfig, HfQuantizerForHfQuant, register
from tests.processes import fresh

from .models import load_with_transformers


def test_importing_hfquant_imports_neither_torch_nor_transformers() -> None:
    code = "import hfquant, sys; print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_second_registration_is_safe_and_the_last_one_counts() -> None:
    register()
    importlib.reload(hfquant)
    register()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is HfQuantConfig
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is HfQuantizerForHfQuant
    assert [c.__name__ for c in auto.LOADING_ATTRIBUTES_CONFIG_TYPES].count("HfQuantConfig") == 1


def test_another_package_of_that_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type("Config", (), {"__module__": "someone_else.config"})
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, stranger)
    with pytest.raises(HfquantError, match="someone_else"):
        register()


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute `nonsense`"):
        hfquant.nonsense  # noqa: B018


@pytest.fixture(scope="module")
def native(dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "model"
    config = HfQuantConfig({"steps": [{"method": "rtn"}], "grid": "w4g32", "format": "native"})
    load_with_transformers("llama", dense("llama"), quantization_config=config).save_pretrained(out)
    return out


def test_a_native_checkpoint_loads_with_hfquant_and_not_without(native: Path) -> None:
    load = f"""
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained({str(native)!r}).model.layers[0].mlp.up_proj).__name__)
    """
    without, with_ = fresh(load, f"{load}".replace("from transformers", "import hfquant; from transformers"))
    assert without.code != 0
    assert "ignore_mismatched_sizes" in without.err
    assert "Unknown quantization type, got hfquant" in without.err
    assert with_.out.strip() == "QLinear", with_.err
