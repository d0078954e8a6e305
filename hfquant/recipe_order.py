"""Which steps go together, and in which order.

What rewrites the whole model comes first, then steps on whole blocks (they prepare the weights), then pruning, then
rounding, which makes up for what was pruned, then what compensates the remaining error, and last what trains finished
blocks.  What is pruned or rounded twice is spoiled once.
"""

from collections.abc import Mapping, Sequence

from . import methods
from .errors import RecipeError
from .recipe_parts import GridSpec, Step

DOES = {
    "rewrite": "rewrites the whole model",
    "block": "prepares blocks",
    "prune": "prunes",
    "quantize": "rounds",
    "compensate": "compensates",
    "distill": "trains",
}


def rounds(step: Step) -> bool:
    """Whether the step leaves the weights on the grid."""
    return methods.kind(step.method) == "quantize" or bool(step.options.get("joint"))


def check(steps: Sequence[Step], grid: GridSpec, overrides: Mapping[str, GridSpec | None]) -> None:
    """Raises RecipeError for steps in an order that destroys what earlier ones did, or that lack something."""
    kinds = [methods.kind(step.method) for step in steps]
    _alone(steps)
    _for_some(steps, kinds)
    _ordered(steps, kinds)
    _not_twice(steps, kinds)
    _one_pass(steps, kinds)
    rounding = [step.method for step in steps if rounds(step)]
    pruning = [step.method for step in steps if methods.kind(step.method) == "prune"]
    if rounding and grid.bits == 16:
        raise RecipeError(
            f"step `{rounding[0]}` rounds, but the recipe does not say how many bits",
            "give `grid: w4g128`, in a shorthand `gptq-w4g128`",
        )
    if not rounding and grid.bits != 16:
        step = f", or `joint: true` to `{pruning[0]}`" if pruning else ""
        raise RecipeError(
            f"the recipe asks for {grid.bits} bit, but none of its steps rounds",
            f"add a step such as `rtn` or `gptq`{step}, or leave `grid` out",
        )
    if not rounding and not pruning:
        raise RecipeError("no step of the recipe makes the model smaller", "add a step that rounds or prunes")
    for glob, special in overrides.items():
        if special is not None and special.bits == 16 and not pruning:
            raise RecipeError(f"`overrides.{glob}` is 16 bit, which is what it was", "write null to keep a layer")
        if special is not None and special.bits != 16 and not rounding:
            raise RecipeError(
                f"`overrides.{glob}` asks for {special.bits} bit, but no step rounds", "add a step such as `rtn`"
            )


def _alone(steps: Sequence[Step]) -> None:
    whole = [step.method for step in steps if methods.scope(step.method) == "model"]
    if whole and len(steps) > 1:
        raise RecipeError(
            f"step `{whole[0]}` trains the whole model, and cannot be combined with other steps",
            "leave the others out: it begins with weights as they are",
        )


def _for_some(steps: Sequence[Step], kinds: Sequence[str]) -> None:
    for step, kind in zip(steps, kinds, strict=True):
        if step.only and (kind not in ("prune", "compensate") or step.options.get("joint")):
            raise RecipeError(
                f"step `{step.method}` cannot be for some layers only (`only`): it {DOES[kind]}"
                + (" and rounds" if step.options.get("joint") else ""),
                "`only` goes with steps that prune or compensate; grids are exempted by `keep` and `overrides`",
            )


def _one_pass(steps: Sequence[Step], kinds: Sequence[str]) -> None:
    """`one_pass` leaves out the compressed blocks' outputs: no other step may need them."""
    quick = [step.method for step in steps if step.options.get("one_pass")]
    for step, kind in zip(steps, kinds, strict=True):
        looks = step.options.get("one_pass") is False or kind == "distill"
        if quick and looks:
            raise RecipeError(
                f"step `{quick[0]}` observes the original model alone (`one_pass`), "
                f"step `{step.method}` needs the compressed one's hidden states",
                f"leave `one_pass` of `{quick[0]}` out"
                + ("" if kind == "distill" else f", or give it to `{step.method}` too"),
            )


def _ordered(steps: Sequence[Step], kinds: Sequence[str]) -> None:
    places = [methods.KINDS.index(kind) for kind in kinds]
    for i in range(1, len(steps)):
        if places[i] < places[i - 1]:
            sorted_steps = [steps[j].method for j in sorted(range(len(steps)), key=places.__getitem__)]
            raise RecipeError(
                f"step `{steps[i].method}` {DOES[kinds[i]]}, and has to come before "
                f"`{steps[i - 1].method}`, which {DOES[kinds[i - 1]]}",
                f"the order is {', '.join(f'`{method}`' for method in sorted_steps)}",
            )


def _not_twice(steps: Sequence[Step], kinds: Sequence[str]) -> None:
    for does, same in (
        ("prune", [step for step, kind in zip(steps, kinds, strict=True) if kind == "prune"]),
        ("round", [step for step in steps if rounds(step)]),
        ("compensate", [step for step, kind in zip(steps, kinds, strict=True) if kind == "compensate"]),
    ):
        found = [step.method for step in same]
        if len(found) > 1 and not all(step.only for step in same):
            raise RecipeError(
                f"steps {' and '.join(f'`{method}`' for method in found)} {does} the same weights",
                "leave one out, or give a step that prunes `joint: false`" if does == "round" else "leave one out",
            )
    names = [step.method for step in steps if not step.only]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"step `{twice[0]}` is there twice", "leave one out")
