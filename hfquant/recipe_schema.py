"""The JSON schema of recipe files, for editors that check them as they are typed."""

from typing import Any

from . import methods
from .recipe import Recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, each method's options included."""
    schema = Recipe.model_json_schema()
    steps = []
    for name in methods.NAMES:
        method = methods.load(name).model_json_schema()
        schema["$defs"] |= method.pop("$defs", {})
        fields = {"method": {"const": name}, **method["properties"]}
        if methods.kind(name) in ("prune", "compensate"):
            fields["only"] = {"type": "array", "items": {"type": "string"}, "minItems": 1}
        steps.append(
            {
                **method,
                "title": name,
                "properties": fields,
                "required": ["method", *method.get("required", [])],
            }
        )
    schema["$defs"]["Step"] = {"oneOf": steps}
    for part, pattern in (
        ("GridSpec", r"^w(\d|16)(g\d+)?(sym|asym)?$"),
        ("ActivationSpec", r"^a\d(g\d+|token|tensor|static)?(sym|asym)?$"),
    ):
        schema["$defs"][part] = {"anyOf": [schema["$defs"][part], {"type": "string", "pattern": pattern}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
