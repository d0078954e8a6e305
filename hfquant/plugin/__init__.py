"""hfquant inside transformers: the only part that knows `transformers.quantizers`.

`from_pretrained` reads hfquant's checkpoints once this is registered (`import hfquant` does that), compresses a
dense model given `quantization_config=HfQuantConfig(...)`, and `load` reads compressed-tensors and GPTQ
checkpoints without their own libraries and keeps them packed.
"""

from transformers.quantizers import auto

from ..errors import HfquantError
from .config import METHOD, HfQuantConfig
from .loading import dequantize, load
from .quantizer import HfQuantizerForHfQuant

__all__ = ["METHOD", "HfQuantConfig", "HfQuantizerForHfQuant", "dequantize", "load", "register"]


def register() -> None:
    """Tell transformers about us.  May be called again, by a reload or a second import path: the last one counts.

    Raises HfquantError if another package took the name.
    """
    present = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD, HfQuantConfig)
    if present.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise HfquantError(
            f"the quantization method `{METHOD}` is already registered by {present.__module__}",
            "import only one of the two packages",
        )
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HfQuantConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = HfQuantizerForHfQuant
    # `quantization_config=HfQuantConfig(dequantize=True)` for a compressed checkpoint is ignored for classes that
    # are not in this tuple, and there is no function to add one
    others = tuple(c for c in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if c.__name__ != HfQuantConfig.__name__)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, HfQuantConfig)


register()
