"""hfquant behind optimum's interface: `OptimumQuantizer`, and the names that `GPTQConfig` has for things."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from ..errors import RecipeError
from ..recipe import Recipe

# what only says how another program works, or what is found here by looking at the model
IGNORED = {
    "quant_method", "tokenizer", "act_group_aware", "meta", "backend", "batch_size", "pad_token_id",
    "cache_block_outputs", "module_name_preceding_first_block", "max_input_length", "quantizer", "checkpoint_format",
    "pack_dtype", "lm_head",
}  # fmt: skip
OPTIONS = {"damp_percent": "damp", "desc_act": "act_order", "true_sequential": "true_sequential"}
LISTS = ("wikitext2", "c4", "c4-new", "ptb", "ptb-new")


def recipe_of(config: Any) -> Recipe:
    """The recipe of a GPTQConfig, or of a dict with its keys.

    `desc_act` decides the order in which columns are rounded; how they are stored it does not: groups stay together.
    Raises RecipeError for a key that has no counterpart.
    """
    given: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    left = {key: value for key, value in given.items() if value is not None and key not in IGNORED}
    if "bits" not in left:
        raise RecipeError("the configuration does not say `bits`", "give `bits`, 2 to 8")
    grid = {
        "bits": left.pop("bits"),
        "group_size": left.pop("group_size", 128),
        "symmetric": left.pop("sym", True),
    }
    step = {"method": "gptq"} | {ours: left.pop(theirs) for theirs, ours in OPTIONS.items() if theirs in left}
    recipe: dict[str, Any] = {"name": "gptq", "steps": [step], "grid": grid}
    if (form := left.pop("format", "gptq")) not in ("gptq", "gptq_v2"):
        raise RecipeError(f"the format `{form}` is unknown", "use `gptq`")
    block, modules = left.pop("block_name_to_quantize", "*"), left.pop("modules_in_block_to_quantize", None)
    if modules is not None:
        names = [name for group in modules for name in ([group] if isinstance(group, str) else group)]
        recipe["overrides"] = {f"{block}.*.{name}": grid for name in names} | {"*": None}
    calibration = {"source": _source(left.pop("dataset", None)), "seq_len": left.pop("model_seqlen", None)}
    recipe["calibration"] = {key: value for key, value in calibration.items() if value is not None}
    if left:
        raise RecipeError(
            f"`{min(left)}` has no counterpart here", "leave it out, or write a recipe: `hfquant recipes gptq-w4g128`"
        )
    return Recipe.parse(recipe)


def _source(dataset: Any) -> str | None:
    if dataset in LISTS:
        raise RecipeError(
            f"`{dataset}` is a name of optimum's", "give the id of a Hub dataset or a text file, or leave it out"
        )
    if dataset is not None and not isinstance(dataset, str):
        raise RecipeError("calibration texts cannot be given as a list", "put them into a text file")
    return dataset


class HfquantQuantizer(OptimumQuantizer):  # type: ignore[misc]  # optimum has no types
    """Compresses a model into a folder.

    quantizer = HfquantQuantizer.from_pretrained("org/model")
    quantizer.quantize("OUT", bits=4, group_size=64)
    """

    def __init__(self, model: str | Path) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, model_or_path: str | Path, file_name: str | None = None) -> "HfquantQuantizer":
        """model_or_path: a Hub id, a folder, or with `file_name` a GGUF file in it."""
        return cls(Path(model_or_path) / file_name if file_name else model_or_path)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        recipe: Any = None,
        text: str | Path | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Compress into `save_dir`, measure, and return the report.

        recipe: a recipe of hfquant's, in any form; otherwise `kwargs` are read as GPTQConfig's.
        text: a file that the result is measured on; by default the packaged text.
        Raises HfquantErrors, a QualityError among them if the result did not pass its gate.
        """
        from ..compress import compress, plan
        from ..measure.verify import check_text, verify

        if file_prefix:
            raise RecipeError("files cannot be given a prefix", "transformers knows them by their names")
        if recipe is not None and kwargs:
            raise RecipeError(f"`{min(kwargs)}` beside a recipe", "say it in the recipe")
        chosen = recipe_of(kwargs) if recipe is None else Recipe.parse(recipe)
        todo = plan(self.model, chosen, save_dir)
        check_text(todo.source, text)  # before hours of work
        for _ in compress(todo):
            pass
        return verify(save_dir, against=self.model, text=text)
