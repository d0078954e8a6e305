"""A compressed model as an ONNX graph, through transformers' own exporter, with its codes as int8.

Every layer becomes DequantizeLinear and MatMul: scale · (code − zero), one scale and zero point per row of a matrix
whose rows are the groups.  A code takes one byte, whatever its bits.  Logits are computed in float32, without a cache:
the whole sequence goes in.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ExportError
from ..plugin import load
from ..runtime.extras import correction
from ..runtime.kv_attention import use_kv_cache
from ..runtime.nn import Packed, QEmbedding, QLinear
from ..tensors.layer import Quantized

FILE = "model.onnx"
MIDDLE = 128  # between codes 0 .. 255 and int8
DENSE = "use `--to dense`, which transformers' exporter takes as it is"


class Codes(nn.Module):
    """A matrix [out, in] as int8 codes with a scale and a zero point for every group of a row."""

    def __init__(self, Q: Quantized) -> None:
        super().__init__()
        Q = Q.filled
        self.shape, columns = Q.shape, Q.grid.columns(Q.shape[1])
        padded = F.pad(Q.codes, (0, -Q.shape[1] % columns))
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("codes", _signed(padded.view(-1, columns)))
        self.register_buffer("scale", Q.scale.detach().float().flatten())
        self.register_buffer("zero", _signed(Q.zero_point.flatten()))

    def forward(self) -> Tensor:
        """float32 [out, in]"""
        decode = torch.ops.quantized_decomposed.dequantize_per_channel
        W: Tensor = decode(self.codes, self.scale, self.zero, 0, -128, 127, torch.int8)
        return W.view(self.shape[0], -1)[:, : self.shape[1]]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, gathered as codes.  ids [...] -> float32 [..., in]"""
        groups = self.scale.shape[0] // self.shape[0]
        at = ids.flatten()
        codes = self.codes.view(self.shape[0], groups, -1)[at].float()
        zero, scale = (t.view(self.shape[0], groups, 1)[at].float() for t in (self.zero, self.scale))
        found = (codes - zero).mul(scale).flatten(1)[:, : self.shape[1]]
        return found.view(*ids.shape, self.shape[1])


def _signed(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - MIDDLE).to(torch.int8)


class Linear(nn.Linear):
    """A linear layer over `Codes`; with what hfquant stores beside them, but for rounded inputs."""

    def __init__(self, layer: QLinear, codes: Codes) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.matrix, self.extras = codes, layer.matrix.extras
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.extras.input_scale is not None:
            x = x / self.extras.input_scale
        y = F.linear(x, self.matrix(), self.bias)
        return y if self.extras.low_rank is None else y + correction(x, self.extras.low_rank)


class Embedding(nn.Module):
    """A table over `Codes`."""

    def __init__(self, table: QEmbedding, codes: Codes) -> None:
        super().__init__()
        self.matrix, self.factor = codes, 1.0 if table.factor is None else float(table.factor)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids) * self.factor


def write(folder: Path, out: Path) -> None:
    """Export the checkpoint in `folder` to `out`/model.onnx, its weights beside it.

    Raises ExportError without the packages, and for what cannot be said.
    """
    exporter, config = _exporter()
    model = load(folder, dtype=torch.float32).eval()
    if model.config.is_encoder_decoder:
        raise ExportError("the export to onnx is for decoders", DENSE)
    _unpack(model)
    if hasattr(model, "hfquant_kv_cache"):
        use_kv_cache(model, None)
    model.config.use_cache = False
    del model.config.quantization_config
    ids = torch.arange(8).view(1, 8) % int(model.config.get_text_config().vocab_size)
    inputs = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    with torch.no_grad():
        made = exporter.export(model, inputs, config=config)
    made.save_pretrained(out)


def _exporter() -> tuple[Any, Any]:
    """Without onnxscript's optimizer, which would turn the codes into floats."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise ExportError(
            f"the export to onnx needs more packages: {error}", "`pip install 'hfquant[onnx]'`"
        ) from error
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers quantized_decomposed)

    return OnnxExporter(), OnnxConfig(dynamic=True, optimize=False)


def _unpack(model: nn.Module) -> None:
    """Put layers over int8 codes in the place of packed ones; a head that is tied to the table shares its codes."""
    shared: dict[int, Codes] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, Packed):
            continue
        _check(name, module)
        if module.grid.is_float:
            model.set_submodule(name, _plain(module))
            continue
        codes = shared.setdefault(id(module.parts[0]), Codes(module.quantized()))
        made = Linear(module, codes) if isinstance(module, QLinear) else None
        model.set_submodule(name, made if made is not None else Embedding(_table(module), codes))


def _table(module: Packed) -> QEmbedding:
    assert isinstance(module, QEmbedding)
    return module


def _check(name: str, module: Packed) -> None:
    if module.encoding.activations is not None:
        raise ExportError(f"the export to onnx does not round the inputs of layers, as {name} does", DENSE)


def _plain(module: Packed) -> nn.Module:
    """A layer whose weights are kept as they are, sparse or not."""
    assert isinstance(module, QLinear)
    layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    layer.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return layer
