"""The `quantization_config` that transformers passes around."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import RecipeError
from ..recipe import Recipe
from ..recipe_budget import with_goal
from ..tensors import formats
from ..tensors.formats import Wire

METHOD = "hfquant"
CHECKPOINT = "checkpoint"  # the key under which `load` hands over the quantization_config of another format
Batches = Iterable[Tensor] | Iterable[str]


class HfQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is to be compressed while it is loaded, and afterwards how it was.

    recipe: a preset or shorthand (`"gptq-w3g128"`, by default `"rtn-w4g64"`), a YAML file, a dict or a `Recipe`.
    Recipes that need no calibration are applied weight by weight while loading, with one dense weight in memory at a
    time; the others load the dense model first.  For a model that does not fit, use `hfquant compress`.

    fit, average_bits, max_loss: a goal (`fit="2.5GB"`, `average_bits=3.5`, `max_loss="1%"`); the bits of every layer
    are then chosen, whatever those of the recipe, which is `gptq` if none is given.  A loss is kept by what is
    predicted: to have it measured, use `hfquant compress`.

    calibration: what to show a calibrated method instead of the packaged text: a text file, a dataset, a list of
    texts, or of token batches [batch, seq] int64.  samples, seq_len, seed: how much of it is used (the recipe's
    values by default).  tokenizer: for a model whose folder has none.

    modules_to_not_convert: modules left dense, by full name or by the end or a middle part of it.
    dequantize: for a checkpoint that is compressed already, load it as a dense model.

    Raises RecipeError.  transformers copies this object: what became of it is found as
    `model.config.quantization_config`, and written to config.json as the wire format's own dict.
    """

    def __init__(
        self,
        recipe: "str | Path | Mapping[str, Any] | Recipe | None" = None,
        *,
        fit: str | int | None = None,
        average_bits: float | None = None,
        max_loss: str | float | None = None,
        calibration: "str | Path | Batches | None" = None,
        samples: int | None = None,
        seq_len: int | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise RecipeError(f"HfQuantConfig is `{METHOD}`, not `{quant_method}`", "leave quant_method out")
        self.quant_method = METHOD
        self.dequantize = dequantize
        named = calibration if isinstance(calibration, str | Path) else None
        asked = {"source": named and str(named), "samples": samples, "seq_len": seq_len, "seed": seed}
        goal = {"fit": fit, "average_bits": average_bits, "max_loss": max_loss}
        self.recipe = _adjust(_with_goal(recipe, goal), asked, modules_to_not_convert or ())
        if self.recipe.trains:
            raise RecipeError(f"recipe `{self.recipe.name}` trains the whole model", "use `hfquant train`")
        if self.recipe.rewrites:
            raise RecipeError(
                f"recipe `{self.recipe.name}` rewrites the whole model, which takes more than its blocks",
                "use `hfquant compress`; `rotate` with `stream: false` stays within the blocks",
            )
        self.wire: Wire | None = None
        # private: transformers copies and prints public attributes, and these can be gigabytes
        self._batches: Batches | None = None if named is not None else calibration  # type: ignore[assignment]
        self._tokenizer = tokenizer

    @property
    def batches(self) -> "Batches | None":
        """The calibration the user passed as objects: token batches or texts."""
        return self._batches

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def stored_as(self, wire: Wire) -> None:
        """From now on this describes a compressed model."""
        self.wire = replace(wire, raw=wire.raw or formats.load(wire.format).config(wire))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read config.json's dict of a checkpoint, or a request: `{"quant_method": "hfquant", "recipe": ...}`.

        Raises FormatError or RecipeError.
        """
        stored = {**config_dict, **{k: v for k, v in kwargs.items() if k == "dequantize"}}
        unused = {k: v for k, v in kwargs.items() if k != "dequantize"}
        if "recipe" in stored:
            config = cls(**stored)
        else:
            config = cls(dequantize=bool(stored.pop("dequantize", False)))
            config.stored_as(formats.parse(stored.get(CHECKPOINT, stored)))
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: of a compressed model the wire format's dict, as it was read or as it is new."""
        if self.wire is not None and self.wire.raw is not None:
            return copy.deepcopy(dict(self.wire.raw))
        asked = {"quant_method": self.quant_method, "recipe": self.recipe.model_dump(mode="json")}
        return asked | ({"dequantize": True} if self.dequantize else {})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's config changes about the config of a checkpoint that is compressed already."""
        return {"dequantize": self.dequantize}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformers deep-copies its keyword arguments and its configs; everything held here is either immutable
        # or the user's calibration data, which must not be doubled
        return copy.copy(self)


def _with_goal(recipe: "str | Path | Mapping[str, Any] | Recipe | None", goal: Mapping[str, Any]) -> Recipe:
    """The recipe, with a goal as its budget if there is one."""
    given = {key: value for key, value in goal.items() if value is not None}
    if not given:
        return Recipe.parse("rtn-w4g64" if recipe is None else recipe)
    base = {"name": "gptq"} if recipe is None else Recipe.parse(recipe).model_dump(mode="json")
    return Recipe.parse(with_goal(base, given))


def _adjust(recipe: Recipe, calibration: Mapping[str, Any], keep: Sequence[str]) -> Recipe:
    """The recipe with the config's own arguments in place of its values, validated again."""
    given = {key: value for key, value in calibration.items() if value is not None}
    if not given and not keep:
        return recipe
    data = recipe.model_dump(mode="json")
    data["calibration"] |= given
    globs = [glob for name in keep for glob in (name, f"*.{name}", f"{name}.*", f"*.{name}.*")]
    data["keep"] = [*data["keep"], *globs]
    return Recipe.parse(data)
