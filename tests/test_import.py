"""Whatever is imported first, in a fresh process: the library works and transformers knows it."""

from tests.processes import fresh

FIRST = [
    "import hfquant; hfquant.load",
    # `compress` is the name of a function and of the package that it lives in
    "from hfquant import compress, plan; assert callable(compress) and callable(plan)",
    "import hfquant.compress; assert callable(hfquant.compress) and callable(hfquant.plan)",
    "import hfquant, transformers",
    "import hfquant, transformers.quantizers.auto",
    "import transformers, hfquant",
    "import transformers.quantizers.auto, hfquant",
    "import hfquant; import hfquant; from transformers import AutoModelForCausalLM; import transformers",
    "import hfquant; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained",
    "from hfquant.cli import engine; engine.quiet(); from hfquant.measure.layers import layers",
]
KNOWN = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
import hfquant, sys
assert known["hfquant"].__module__ == "hfquant.plugin.quantizer"
assert hfquant.HfQuantConfig.__name__ == "HfQuantConfig"
assert not [f for f in sys.meta_path if type(f).__module__.startswith("hfquant")]
"""


def test_order_of_imports() -> None:
    for first, done in zip(FIRST, fresh(*(f"{first}\n{KNOWN}" for first in FIRST)), strict=True):
        assert done.code == 0, f"{first}\n{done.err}"
