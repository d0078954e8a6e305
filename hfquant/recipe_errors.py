"""What pydantic says of a recipe, as one RecipeError: where, what, and the nearest key that exists."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json

from .errors import RecipeError

M = TypeVar("M", bound=BaseModel)


def validate(cls: type[M], data: Any, where: str) -> M:
    """`cls` from plain data, nothing coerced: "4" is not 4.  `where` names the data in the error.

    Raises RecipeError that tells every problem found, with a hint for each.
    """
    try:
        # as JSON, where strict still lets an array be a tuple and 1 be a float
        return cls.model_validate_json(to_json(data, inf_nan_mode="constants", fallback=str), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        paths = [detail["loc"] for detail in details]
        # "a list of steps is needed" says nothing once "step 0 is wrong" is said
        inner = [d for d in details if not any(p != d["loc"] and p[: len(d["loc"])] == d["loc"] for p in paths)]
        told = [_tell(cls, detail, where) for detail in inner]
    messages, hints = zip(*dict.fromkeys(told), strict=True)
    raise RecipeError("\n".join(messages), "\n      ".join(dict.fromkeys(hint for hint in hints if hint)) or None)


def _tell(cls: type[BaseModel], detail: ErrorDetails, where: str) -> tuple[str, str | None]:
    path = detail["loc"]
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(str(path[-1]), _at(cls, path[:-1]).model_fields, where, path[:-1])
    if detail["type"] == "missing":
        return f"{where} lacks `{_dotted(path)}`", _description(cls, path)
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return f"{where}: {reason}", None
    if detail["type"] == "model_type":
        reason = "should be a mapping of keys to values"
    value = detail["input"]
    return f"`{_dotted(path)}` of {where} cannot be {_brief(value)}: {reason}", _description(cls, path)


def unknown_key(
    key: str, known: Mapping[str, Any], where: str, path: tuple[int | str, ...] = ()
) -> tuple[str, str | None]:
    """Message and hint for a key that nothing knows."""
    place = f"`{_dotted(path)}` of {where}" if path else where
    close = get_close_matches(key, known, n=1)
    return (
        f"unknown key `{key}` in {place}",
        f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}" if known else "it takes no keys",
    )


def _at(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model class that stands at `path` inside `cls`."""
    for part in path:
        if isinstance(part, str) and part in cls.model_fields:
            cls = next(_models(cls.model_fields[part].annotation), cls)
    return cls


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _description(cls: type[BaseModel], path: tuple[int | str, ...]) -> str | None:
    """A field's own words, which are its documentation."""
    names = [part for part in path if isinstance(part, str)]
    for at in range(len(names) - 1, -1, -1):
        field = _at(cls, tuple(names[:at])).model_fields.get(names[at])
        if field is not None:
            return f"`{names[at]}`: {field.description}" if field.description else None
    return None


def _dotted(path: tuple[int | str, ...]) -> str:
    return ".".join(map(str, path))


def _brief(value: Any) -> str:
    text = repr(value)
    return f"`{text}`" if len(text) <= 60 else f"`{text[:57]}...`"
