"""Steps of kind "rewrite": the model that is compressed computes what the source does, with other weights."""

from ..memory import give_back
from ..model.source import Source
from ..recipe import Recipe


def rewritten(source: Source, recipe: Recipe, *, outline: bool = False) -> Source:
    """The source as the recipe's steps want it.  outline: as far as headers tell, without reading a weight.

    Raises SourceError for a model that a step cannot rewrite exactly.
    """
    for step in recipe.steps:
        built = step.build()
        if getattr(built, "rewrites", False):
            source = getattr(built, "outline" if outline else "rewrite")(source)
            give_back()
    return source
