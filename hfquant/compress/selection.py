"""Which weights of a model a recipe compresses, and how they will be stored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import methods
from ..errors import FormatError, RecipeError
from ..methods import Method
from ..methods.rtn import Method as Rtn
from ..model.blocks import stacks, weights
from ..model.caches import check_cache
from ..recipe import Recipe
from ..recipe_places import Place, Role, matches
from ..tensors import formats
from ..tensors.encoding import Activations, Encoding
from ..tensors.formats import Format, Layers, Wire
from ..tensors.grid import Grid
from ..tensors.shards import nbytes

STORED_AS = {"head": "linear"}  # kinds that are another one to a format

# (parameter, kind, (out, in), place in a stack)
Found = tuple[str, str, tuple[int, int], Place | None]


@dataclass(frozen=True)
class Target:
    """One weight matrix to compress, or one per expert.

    parameter: its name in the model.  layer: the name that recipe and wire know it by, which is the module's (the
    matrices of fused experts share a grid).  shape: (out, in).  activations: how its inputs are rounded, if they are.
    place: in its stack, None for what is in no block.
    """

    parameter: str
    layer: str
    kind: str
    shape: tuple[int, int]
    grid: Grid
    activations: Activations | None = None
    place: Place | None = None


def select(model: nn.Module, recipe: Recipe, dtype: torch.dtype | None = None) -> dict[str, Target]:
    """Parameter name -> target, for every weight that the recipe gives a grid.

    dtype: what the model will run in; weights that it then keeps in float32 stay as they are.
    Raises RecipeError if that is none, if a role in the recipe means no part of this model, or if a step cannot
    handle one of the weights.
    """
    found: dict[str, Target] = {}
    inside = list(_inside(model))
    _check_roles(recipe, inside)
    stay = _kept_in_float32(model, dtype)
    for name, kind, shape, place in [*inside, *_ends(model)]:
        layer = name.rpartition(".")[0]
        spec = None if stay(name) else recipe.grid_for(layer, kind, place)
        if spec is not None:
            rounded = recipe.activations_for(layer, kind, place)
            inputs = None if rounded is None else rounded.build()
            target = Target(name, layer, kind, shape, spec.grid(), inputs, place)
            if recipe.trains or steps_for(target, recipe):  # fused experts stay as they are where no step is for them
                _check_shape(recipe, target)
                found[name] = target
    if not found:
        raise RecipeError(
            f"recipe `{recipe.name}` leaves every layer of this model as it is",
            "look at its `keep` and `overrides`, and at modules_to_not_convert",
        )
    return found


def steps_for(target: Target, recipe: Recipe) -> list[Method]:
    """The methods that one weight goes through by itself.

    Embeddings and head are rounded to nearest; fused experts go without what cannot be stored of them; what has no grid
    is not rounded.
    """
    if target.kind in ("embedding", "head"):
        return [Rtn()]
    without = {"rewrite", "block", "distill"} | ({"quantize"} if target.grid.is_float else set())
    own = recipe.steps_of(target.layer, target.place)
    steps = [placed(step.build(), _alone(target)) for step in own if methods.kind(step.method) not in without]
    return [step for step in steps if target.kind != "experts" or getattr(step, "experts", True)]


def placed(method: Any, targets: Mapping[str, Target]) -> Any:
    """The method as it is for these weights, by the names that it is called with: options that are given for patterns
    of layers then say what those mean of them, the first pattern that means a layer deciding."""
    found: dict[str, dict[str, Any]] = {option: {} for option in getattr(method, "by_layer", ())}
    for option, values in found.items():
        for name, target in targets.items():
            for pattern, value in getattr(method, option).items():
                if matches(pattern, target.layer, target.place):
                    values.setdefault(name.removesuffix(".weight"), value)
    return method.model_copy(update=found) if found else method


def _alone(target: Target) -> dict[str, Target]:
    """One weight, by its name and, for what is asked of shapes alone, by none."""
    return {target.layer: target, "": target}


def _kept_in_float32(model: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Whether a parameter overflows in that type: what reads T5's `wo` does in float16, so transformers keeps it.

    A packed layer computes in the type of its input, and would bring the overflow back.
    """
    plan = getattr(model, "_get_dtype_plan", None)
    kept = () if dtype is None or plan is None else tuple(plan(dtype))
    return lambda name: any(f".{part}." in f".{name}." for part in kept)


def _check_roles(recipe: Recipe, inside: Sequence[Found]) -> None:
    for pattern in recipe.patterns:
        if pattern.startswith("@") and not any(matches(pattern, name, place) for name, _, _, place in inside):
            raise RecipeError(
                f"`{pattern}` of recipe `{recipe.name}` means no layer of this model",
                "name the modules with a glob such as `*.self_attn.*`",
            )


def _check_shape(recipe: Recipe, target: Target) -> None:
    for method in steps_for(target, recipe):
        check: Callable[[tuple[int, int]], None] | None = getattr(method, "check", None)
        try:
            if check is not None:
                check(target.shape)
        except ValueError as error:
            name = type(method).__module__.rpartition(".")[2]
            raise RecipeError(
                f"step `{name}` does not fit `{target.layer}`: {error}",
                f"change the step's options, or leave the layer out with `--set keep=[{target.layer}]`",
            ) from None


def _inside(model: nn.Module) -> Iterator[Found]:
    """(parameter, kind, (out, in), place) of the weights inside the blocks."""
    for stack in stacks(model):
        for i, path in enumerate(stack.blocks):
            block = model.get_submodule(path)
            for w in weights(block):
                yield f"{path}.{w.name}", w.kind, w.shape(block), Place(_role(block, w.module), i, len(stack.blocks))


def _role(block: nn.Module, module: str) -> Role:
    """What a module of a block works for: attention, if something around it inside the block is called so."""
    parts = module.split(".")
    around = (type(block.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts)))
    return "attention" if any("attention" in name.lower() for name in around) else "feed_forward"


def _ends(model: nn.Module) -> list[Found]:
    """The same of the token embeddings, and of the head where it has a weight of its own."""
    found: list[Found] = []
    tied = getattr(model, "all_tied_weights_keys", {})
    whole: Any = model
    table, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    for name, module in model.named_modules():
        parameter = f"{name}.weight"
        if parameter in tied:
            continue
        if module is table and isinstance(module, nn.Embedding):
            found.append((parameter, "embedding", (module.num_embeddings, module.embedding_dim), None))
        elif module is head and isinstance(module, nn.Linear):
            found.append((parameter, "head", (module.out_features, module.in_features), None))
    return found


def expected(target: Target, recipe: Recipe) -> Encoding:
    """How a target will be stored, as far as its recipe tells beforehand.

    A method whose result is more than a grid says what it adds in `encodes(encoding, shape) -> Encoding`.
    """
    encoding = Encoding(target.grid, activations=target.activations)
    if target.kind in ("embedding", "head"):  # these are rounded, whatever the steps are
        return encoding
    for step in recipe.steps_of(target.layer, target.place):
        method = placed(step.build(), _alone(target))
        encodes: Callable[[Encoding, tuple[int, int]], Encoding] | None = getattr(method, "encodes", None)
        if encodes is not None and (target.kind != "experts" or getattr(method, "experts", True)):
            encoding = encodes(encoding, target.shape)
    return encoding


def stored_bytes(
    fmt: Format, encoding: Encoding, shape: tuple[int, int], scale_dtype: torch.dtype, copies: int = 1
) -> int:
    """What a weight, or so many like it, takes on disk, but for the file's header."""
    return copies * sum(nbytes(size, dtype) for size, dtype in fmt.spec(encoding, shape, scale_dtype).values())


def wire_for(targets: Mapping[str, Target], model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> Wire:
    """How these targets are stored: the recipe's format, or the most widely readable one that can.

    dtype: what the model is stored in.  What the layers turn out to be is known when they are finished:
    `Wire.as_written`.  Raises FormatError where the recipe's format cannot store a layer, RecipeError for a cache that
    the model does not have.
    """
    layers = {t.layer: (expected(t, recipe), t.shape, STORED_AS.get(t.kind, t.kind)) for t in targets.values()}
    name = _format(recipe, layers)
    formats.check(name, layers)
    cache = recipe.kv_cache.build() if recipe.kv_cache else None
    if cache is not None:
        check_cache(model, cache)
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    # float32 scales are a waste, except first in the model: transformers takes a model's dtype from its first
    # floating parameter, the scale of a packed embedding
    halved = dtype == torch.float32 and not any(t.kind == "embedding" for t in targets.values())
    return Wire(
        format=name,
        layers={layer: formats.load(name).keeps(encoding) for layer, (encoding, _, _) in layers.items()},
        ignore=tuple(ignore),
        scale_dtype=torch.float16 if name == "gptq" or halved else dtype,
        kv_cache=cache,
    )


def _format(recipe: Recipe, layers: Layers) -> str:
    """The recipe's format.  Raises FormatError for one that cannot say how keys and values are kept."""
    if recipe.kv_cache is None:
        return formats.choose(layers) if recipe.format == "auto" else recipe.format
    if recipe.format not in ("auto", "native"):
        raise FormatError(
            f"format `{recipe.format}` does not say that keys and values are kept in {recipe.kv_cache.bits} bit",
            "use `--set format=native`, or leave `kv_cache` out and pass a `CompressedCache` to `generate`",
        )
    return "native"
