"""A model without weights, into which parts are loaded as they are needed and dropped again.

transformers builds the modules on the meta device and converts checkpoint tensors into parameters (renamings,
per-expert tensors into fused ones), exactly as `from_pretrained` does; only here it happens part by part.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..errors import SourceError
from .source import Source

NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # what transformers asks before it loads with a pool of threads


class Skeleton:
    """`model` on the meta device, and the knowledge of which stored tensors fill which parameters.

    dtype: the type the modules compute in.  Raises SourceError if the stored shapes are not the config's.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        with init_empty_weights(include_buffers=False), _NoStorage(), _quietly():
            self.model = _model_class(source)._from_config(source.config, dtype=dtype).eval()
        self._adapt()
        self.model.tie_weights()
        self.model.config.use_cache = False
        self._buffers = {name: b for name, b in self.model.named_buffers()}
        self.stored = self._map_names()
        self._check_shapes()

    def _adapt(self) -> None:
        """For subclasses: change the modules before names are mapped to them."""

    def _conversions(self) -> list[Any]:
        """How stored tensors become parameters: transformers' renamings and converters, made anew at every call."""
        return list(get_model_conversion_mapping(self.model))

    def _map_names(self) -> dict[str, list[str]]:
        """Parameter (or the first of several made together) -> the stored tensors it is made of."""
        conversions = self._conversions()
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        have = self.model.state_dict()
        self.converted: set[str] = set()
        mapped: dict[str, list[str]] = {}
        for name in self.source.tensors:
            prefix = self.model.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, prefix, have)
            if target not in have and name in have:
                target, pattern = rename_source_key(name, [], [], prefix, have)
            if target in have:
                mapped.setdefault(target, []).append(name)
                if pattern is not None:
                    self.converted.add(target)
        self._owners_of_tied(mapped)
        return mapped

    def _owners_of_tied(self, mapped: dict[str, list[str]]) -> None:
        """A shared weight may be stored under the name of the one that borrows it: it belongs to its owner."""
        self.renamed: dict[str, str] = {}  # stored name -> the parameter's own
        for borrower, owner in getattr(self.model, "all_tied_weights_keys", {}).items():
            if borrower in mapped and owner not in mapped and borrower not in self.converted:
                mapped[owner] = mapped.pop(borrower)
                self.renamed[mapped[owner][0]] = owner

    def _check_shapes(self) -> None:
        have = self.model.state_dict()
        for target, names in self.stored.items():
            if target in self.converted:
                continue
            stored, wanted = self.source.tensors[names[0]].shape, tuple(have[target].shape)
            if stored != wanted:
                raise SourceError(
                    f"the config of {self.source.id} says {target} is {wanted}, the checkpoint holds {stored}",
                    "config.json and the weights do not belong together: download both again",
                )

    def missing(self) -> list[str]:
        """Parameters that no stored tensor fills and that are not tied to one that is filled."""
        names = {id(p): n for n, p in self.model.named_parameters(remove_duplicate=True)}
        filled = {id(self.model.get_parameter(n)) for n in self.stored if n not in self._buffers}
        first = {t.rsplit(".", 1)[0] for t in self.converted}  # converters that make several parameters name the first
        return [n for i, n in names.items() if i not in filled and n.rsplit(".", 1)[0] not in first]

    def names_under(self, prefix: str) -> list[str]:
        """The parameters of one module that stored tensors fill."""
        return [name for name in self.stored if name.startswith(prefix + ".")]

    def load(self, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        """Fill these parameters from the source, converted to `dtype` (the model's own by default)."""
        wanted = [name for name in names if name in self.stored]
        for name in wanted:
            self._retype(name, dtype or self.dtype)
        stored = [stored for name in wanted for stored in self.stored[name]]
        # a model that keeps some modules in float32 decides about each when it is given what is stored
        kept = self.model._keep_in_fp32_modules or self.model._keep_in_fp32_modules_strict
        read_as = None if kept else dtype or self.dtype
        tensors = {self.renamed.get(name, name): self.source.read(name, read_as) for name in stored}
        config = LoadStateDictConfig(weight_mapping=self._conversions(), dtype=dtype or self.dtype)
        with _quietly():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        if info.conversion_errors:
            target, reason = next(iter(info.conversion_errors.items()))
            raise SourceError(f"{target} cannot be made from the stored tensors: {str(reason).splitlines()[0]}")
        self.model.tie_weights()

    def load_module(self, prefix: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Fill one module and return it."""
        self.load(self.names_under(prefix), dtype)
        return self.model.get_submodule(prefix)

    def drop(self, names: Iterable[str]) -> None:
        """Put these parameters back on the meta device."""
        for name in names:
            if name not in self._buffers:
                self._retype(name, self.dtype)
        self.model.tie_weights()

    def drop_module(self, prefix: str) -> None:
        self.drop([f"{prefix}.{name}" for name, _ in self.model.get_submodule(prefix).named_parameters()])

    def _retype(self, name: str, dtype: torch.dtype) -> None:
        """A fresh meta parameter of that type in place of the present one."""
        if name in self._buffers:
            return
        module, leaf = self._owner(name)
        old = module._parameters[leaf]
        if old is not None:
            kept = dtype if old.dtype.is_floating_point else old.dtype
            module._parameters[leaf] = nn.Parameter(
                torch.empty(old.shape, dtype=kept, device="meta"), requires_grad=False
            )

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def stored_names(self, parameter: str, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names in the checkpoint's own layout for tensors that replace one parameter.

        `parts` maps a component name to a tensor with the parameter's leading dimensions; a parameter that was
        fused from several stored tensors is taken apart again the way it was put together.
        """
        if parameter not in self.converted:
            name = self.stored[parameter][0]
            stem = re.sub(r"\.weight$", "", self.renamed.get(name, name))
            yield from ((f"{stem}.{component}", tensor) for component, tensor in parts.items())
            return
        from transformers.core_model_loading import revert_weight_conversion

        for component, tensor in parts.items():
            for name, piece in revert_weight_conversion(self.model, {parameter: tensor}).items():
                yield re.sub(r"\.weight$", "", name) + f".{component}", piece.contiguous()


def _model_class(source: Source) -> type[PreTrainedModel]:
    """The class the config names if it has a language-model head, else the one its type has."""
    for name in source.config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None and getattr(cls, "can_generate", lambda: False)():
            found: type[PreTrainedModel] = cls
            return found
    auto = AutoModelForSeq2SeqLM if source.config.is_encoder_decoder else AutoModelForCausalLM
    try:
        found = auto._model_mapping[type(source.config)]
    except KeyError as error:
        raise SourceError(
            f"{source.id} ({source.config.model_type}) is not a generative language model",
            "hfquant compresses models with a causal or sequence-to-sequence head",
        ) from error
    return found


class _NoStorage(TorchFunctionMode):
    """Lets `torch.empty`, which layers call for their weights, allocate nothing.

    Moving each weight to meta after it was allocated would do too, but leaves holes in the heap: gigabytes of address
    space for a deep model.  Buffers are computed, not left empty, and stay real.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "empty" and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and notices for every single part, and no threads: each would keep a heap of its own."""
    bars, level, threads = logging.is_progress_bar_enabled(), logging.get_verbosity(), os.environ.get(NO_THREADS)
    os.environ[NO_THREADS] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if threads is None:
            del os.environ[NO_THREADS]
        else:
            os.environ[NO_THREADS] = threads
        if bars:
            logging.enable_progress_bar()
