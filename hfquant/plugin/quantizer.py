"""The HfQuantizer: what transformers calls while it loads, saves and dequantizes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError, HfquantError, ResourceError
from ..runtime.swap import dequantize_, swap
from ..tensors import formats
from ..tensors.formats import Format, Wire
from .checkpoint import check_loaded, check_undivided, encodings, mark_initialized, scale_leaves, stored_scale_dtype
from .config import HfQuantConfig
from .conversions import companions, component_names
from .onload import QuantizeOnLoad

if TYPE_CHECKING:
    from ..compress.selection import Target


class HfQuantizerForHfQuant(HfQuantizer):  # type: ignore[misc]
    """Three ways through `from_pretrained`:

    a compressed checkpoint: packed modules take the place of dense ones before the weights are read;
    a dense one, recipe without calibration: each weight is compressed as soon as it is read;
    a dense one, recipe with calibration: the dense model is loaded, then compressed in memory.
    """

    requires_calibration = False

    def __init__(self, quantization_config: HfQuantConfig, **kwargs: Any) -> None:
        # a copy: what becomes of this model is no business of the next one loaded with the user's config
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.targets: dict[str, Target] = {}
        self._scales: set[str] = set()
        self._tokens: list[torch.Tensor] | None = None  # what a calibrated recipe will be shown
        self.failure: Exception | None = None  # what went wrong while a weight was compressed, see `QuantizeOnLoad`
        if self.pre_quantized and self.quantization_config.wire is None:
            raise CheckpointError(
                "config.json asks for hfquant but does not say how the weights are stored",
                "the quantization_config is incomplete: download the checkpoint again",
            )
        if self.pre_quantized:
            self._components()

    @property
    def wire(self) -> Wire:
        wire: Wire | None = self.quantization_config.wire
        if wire is None:
            raise HfquantError("the model has not been compressed yet")
        return wire

    @property
    def fmt(self) -> Format:
        return formats.load(self.wire.format)

    def _components(self) -> None:
        # what `update_weight_conversions` goes by
        self.serialized_names = {"weight": component_names(self.wire)}

    # -- checks and sizes, before anything is loaded

    def validate_environment(self, *_: Any, **kwargs: Any) -> None:
        """Called twice: with the device_map the user passed, and with the one it became."""
        device_map = kwargs.get("device_map")
        devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        if self.pre_quantized:
            return
        if "disk" in devices:
            raise ResourceError(
                "a model cannot be compressed while it is loaded with part of it offloaded to disk: transformers "
                "would leave the dense weights there",
                "compress it first (`hfquant compress`), then load the result with this device_map",
            )
        if self.quantization_config.recipe.needs_calibration and len(devices) > 1:
            raise ResourceError(
                "a calibrated recipe needs the whole model on one device",
                "load without device_map, or use `hfquant compress`, which keeps one block in memory",
            )

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight of a dense parameter that will be compressed as it is loaded."""
        if self.pre_quantized:
            return None
        grid = self.quantization_config.recipe.grid
        return (grid.bits + (16 / grid.group_size if grid.group_size > 0 else 0)) / 8

    def get_new_dtype(self, converter: WeightTransform, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales keep the type they are stored in, whatever type the model is loaded in."""
        if any(target.rpartition(".")[2] in self._scales for target in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    # -- loading

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_undivided(model.config)
        if self.pre_quantized:
            self._prepare_packed(model, kwargs.get("checkpoint_files"))
        elif not self.quantization_config.recipe.needs_calibration:
            self._prepare_dense(model)
        elif self.quantization_config.batches is not None or not self.quantization_config.recipe.generates:
            from .calibrated import calibration_batches

            # before a weight is read: text that is missing or too short is no reason to load the model first
            with torch.device("cpu"):  # not on meta, where the model is at this time
                self._tokens = calibration_batches(model, self.quantization_config)
        return model

    def _prepare_packed(self, model: Any, files: Sequence[str] | None) -> None:
        scale_dtype = stored_scale_dtype(files or (), self.fmt) or self.wire.scale_dtype
        self.quantization_config.wire = replace(self.wire, scale_dtype=scale_dtype)
        swap(model, self.wire)
        mark_initialized(model)
        self._scales = scale_leaves(model)

    def _prepare_dense(self, model: Any) -> None:
        from ..compress.selection import select, wire_for

        recipe = self.quantization_config.recipe
        self.targets = select(model, recipe, model.dtype)
        self.quantization_config.stored_as(wire_for(self.targets, model, recipe, model.dtype))
        self._components()

    def update_weight_conversions(self, conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        """Conversions for every component of fused experts that are packed."""
        names = self.serialized_names.get("weight", [])
        return companions(conversions, model, names, used=not self.pre_quantized)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Only ever true for dense checkpoints: it also switches transformers' shape check off."""
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeOnLoad(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if not self.pre_quantized and self.quantization_config.recipe.needs_calibration:
            from .calibrated import compress_loaded

            self.quantization_config.stored_as(compress_loaded(model, self.quantization_config, self._tokens))
            self._tokens = None
            self._components()
        elif not self.pre_quantized:  # what was found out only while compressing, such as how many weights are kept
            self.quantization_config.stored_as(self.wire.as_written(encodings(model, self.targets)))
            self._components()
        check_loaded(model, self.targets)
        if not self.pre_quantized:
            model._weight_conversions = self.update_weight_conversions(model._weight_conversions, model)
            model.config.quantization_config = self.quantization_config
        if self.pre_quantized and self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
        elif self.wire.kv_cache is not None:
            # not above: that needs all of transformers, which may be what is being imported
            from ..runtime.kv_attention import use_kv_cache

            use_kv_cache(model, self.wire.kv_cache)
        return model

    # -- afterwards

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model, dtype or model.dtype)
        if hasattr(model, "hfquant_kv_cache"):
            from ..runtime.kv_attention import use_kv_cache

            use_kv_cache(model, None)
        return model

    def is_serializable(self) -> bool:
        """A method, not a property: save_pretrained calls it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters may be trained on top; the packed weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
