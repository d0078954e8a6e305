"""`import hfquant` is light, and enough; without it a native checkpoint fails loudly."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers import auto

import hfquant
from hfquant.compress import compress
from hfquant.errors import HfquantError
from hfquant.plugin import METHOD, HfQuantConfig, HfQuantizerForHfQuant, register
from tests.processes import fresh


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
def native(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in our own format: what is stored of their weights has many shapes."""
    folder, size = tmp_path_factory.mktemp("native"), {"samples": 2, "seq_len": 32}
    wanted: dict[str, tuple[str, Any]] = {
        "grid": ("llama", {"steps": [{"method": "rtn"}], "grid": "w4g32", "format": "native"}),
        "widths": ("gpt2", "rtn-w5g48"),
        "experts": ("mixtral", {"steps": [{"method": "rtn"}], "grid": "w4g32", "format": "native"}),
        "embeddings": (
            "llama-tied",
            {"steps": [{"method": "rtn"}], "grid": "w4g32", "keep": ["*.layers.*"], "embeddings": "w8g32"},
        ),
        "2of4": ("llama", "sparsegpt-2of4-w4g32"),
        "pruned": ("llama", {"steps": [{"method": "sparsegpt", "sparsity": 0.5}], "format": "native"}),
        "low rank": ("bart", "lorc-r4-w3g32"),
        "inputs": ("llama", {"steps": [{"method": "rtn"}], "grid": "w4g32", "activations": {"bits": 8}}),
    }
    for name, (family, recipe) in wanted.items():
        list(compress(built(family), recipe, folder / name, **size))
    return {name: folder / name for name in wanted}


def test_native_checkpoints_load_with_hfquant_and_not_without(native: dict[str, Path]) -> None:
    load = f"""
        import json
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        for name, folder in { ({name: str(folder) for name, folder in native.items()})!r}.items():
            auto = AutoModelForSeq2SeqLM if "low" in name else AutoModelForCausalLM
            try:
                auto.from_pretrained(folder)
                said = "loaded"
            except Exception as error:
                said = str(error)
            print(json.dumps([name, said]))
    """
    without, with_ = fresh(load, f"{load}".replace("import json", "import hfquant, json"))
    refused, loaded = (dict(map(json.loads, said.out.splitlines())) for said in (without, with_))
    assert loaded == dict.fromkeys(native, "loaded"), with_.err
    assert refused.keys() == native.keys(), without.err
    for name, said in refused.items():
        assert "ignore_mismatched_sizes" in said, f"{name}: {said}"
    assert without.err.count("Unknown quantization type, got hfquant") >= 1
    assert "MISMATCH" in without.err
