"""`hfquant.load`: any checkpoint whose format hfquant knows, kept packed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

# its classes are looked up when they are used: this is imported while transformers itself is being imported
import transformers

from ..errors import CheckpointError
from ..tensors import formats
from .config import CHECKPOINT, METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load(model: str | Path, *, dequantize: bool = False, **kwargs: Any) -> "PreTrainedModel":
    """Load a compressed checkpoint: hfquant's own format, compressed-tensors or GPTQ.

    The weights stay packed, and neither compressed-tensors nor gptqmodel is needed.  `save_pretrained` writes the
    same tensors and the same `quantization_config` back.  `kwargs` are those of `from_pretrained` (`device_map`,
    `dtype`, `revision`, ...).

    model: a folder or a Hub id.  dequantize: load a dense model instead.
    Raises CheckpointError if the model is not compressed, FormatError if hfquant cannot read how it is.
    """
    config = kwargs.pop("config", None)
    if config is None:
        hub = {key: kwargs[key] for key in HUB if key in kwargs}
        config = transformers.AutoConfig.from_pretrained(model, **hub)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise CheckpointError(
            f"{model} is not compressed: its config.json has no quantization_config",
            "load it with transformers, or compress it: `hfquant compress MODEL --recipe rtn-w4g64 --out DIR`",
        )
    stored = dict(stored)
    stored.pop("dequantize", None)
    formats.parse(stored)
    config.quantization_config = {"quant_method": METHOD, CHECKPOINT: stored, "dequantize": dequantize}
    loaded: PreTrainedModel = _model_class(config).from_pretrained(model, config=config, **kwargs)
    return loaded


def _model_class(config: "PreTrainedConfig") -> Any:
    """The class that config.json names; for a class of the repository's own, the auto class that will find it."""
    for name in config.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def dequantize(model: "PreTrainedModel", dtype: Any = None) -> "PreTrainedModel":
    """Turn a compressed model into a dense one, in place, and return it.  dtype: the model's own by default."""
    dense: PreTrainedModel = model.dequantize(dtype)
    return dense
