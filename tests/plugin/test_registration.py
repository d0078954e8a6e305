"""`import hfquant` is light, and enough, in whatever order; without it a native checkpoint fails loudly."""

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.quantizers import auto

import hfquant
from hfquant.errors import HfquantError
from hfquant.plugin import METHOD, HfQuantConfig, HfQuantizerForHfQuant, register

from .models import load_with_transformers


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=180, check=False
    )


def test_importing_hfquant_imports_neither_torch_nor_transformers() -> None:
    done = python("import hfquant, sys; print({'torch', 'transformers', 'pydantic'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import hfquant, transformers",
        "import transformers, hfquant",
        "import transformers.quantizers.auto, hfquant",
        "import hfquant; import hfquant; from transformers import AutoModelForCausalLM; import transformers",
    ],
)
def test_registered_in_either_order(imports: str) -> None:
    done = python(f"""
        {imports}
        from transformers.quantizers import auto
        print(auto.AUTO_QUANTIZER_MAPPING["hfquant"].__module__, hfquant.HfQuantConfig.__name__)
        import sys
        print([f for f in sys.meta_path if type(f).__module__.startswith("hfquant")])
    """)
    assert done.stdout.split("\n")[:2] == ["hfquant.plugin.quantizer HfQuantConfig", "[]"], done.stderr


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


def test_without_hfquant_a_native_checkpoint_does_not_load(native: Path) -> None:
    done = python(f"""
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(native)!r})
    """)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr
    assert "Unknown quantization type, got hfquant" in done.stderr


def test_with_hfquant_imported_it_does(native: Path) -> None:
    done = python(f"""
        import hfquant
        from transformers import AutoModelForCausalLM
        print(type(AutoModelForCausalLM.from_pretrained({str(native)!r}).model.layers[0].mlp.up_proj).__name__)
    """)
    assert done.stdout.strip() == "QLinear", done.stderr
