"""Whatever is imported first, in a fresh process: the library works and transformers knows it."""

import subprocess
import sys

import pytest

FIRST = [
    "import hfquant; hfquant.load",
    # `compress` is the name of a function and of the package that it lives in
    "from hfquant import compress, plan; assert callable(compress) and callable(plan)",
    "import hfquant.compress; assert callable(hfquant.compress) and callable(hfquant.plan)",
    "import hfquant, transformers.quantizers.auto",
    "import hfquant; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained",
    "from hfquant.cli import engine; engine._quiet(); from hfquant.measure.layers import layers",
]
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'hfquant' in known"


@pytest.mark.parametrize("first", FIRST)
def test_order_of_imports(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{KNOWN}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
