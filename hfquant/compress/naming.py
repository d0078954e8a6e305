"""Finished weights -> tensors under the names they have in the checkpoint."""

from collections.abc import Mapping

from torch import Tensor, tensor

from ..model.skeleton import Skeleton
from ..tensors.formats import Format, check
from ..tensors.layer import Quantized
from .selection import STORED_AS


def named_parts(skeleton: Skeleton, fmt: Format, parameter: str, kind: str, Q: Quantized) -> dict[str, Tensor]:
    """The tensors that replace one parameter of the model.

    Q of fused experts holds all experts' rows one after the other.  They are stored as the source
    has them: fused under the parameter's own name, or per expert and projection.
    """
    check(fmt.name, {parameter: (Q.encoding, Q.shape, STORED_AS.get(kind, kind))})
    return names_of(skeleton, fmt, parameter, kind, fmt.pack(Q), Q.shape[1])


def names_of(
    skeleton: Skeleton, fmt: Format, parameter: str, kind: str, parts: Mapping[str, Tensor], in_features: int
) -> dict[str, Tensor]:
    """The same of components that are packed, or, on the meta device, of what they will be."""
    if kind != "experts":
        return dict(skeleton.stored_names(parameter, dict(parts)))
    experts = skeleton.model.get_parameter(parameter).shape[0]
    per_row = {c: t for c, t in parts.items() if c != "weight_shape"}
    stacked = {c: t.view(experts, len(t) // experts, *t.shape[1:]) for c, t in per_row.items()}
    if fmt.name == "native" and parameter not in skeleton.converted:
        return {parameter + component.removeprefix("weight"): t for component, t in stacked.items()}
    named = dict(skeleton.stored_names(parameter, stacked))
    if "weight_shape" in parts:
        for name, t in list(named.items()):
            if name.endswith(".weight_packed"):
                named[name.replace("weight_packed", "weight_shape")] = tensor([t.shape[-2], in_features])
    return named


def carried_parts(skeleton: Skeleton, prefix: str, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of parameters that are not compressed but changed.  changed: by name inside `prefix`."""
    found: dict[str, Tensor] = {}
    for name, value in changed.items():
        parameter = f"{prefix}.{name}"
        if parameter in skeleton.converted:
            component = name.rpartition(".")[2]
            for stored, piece in skeleton.stored_names(parameter, {component: value}):
                found[stored.removesuffix(f".{component}")] = piece
        else:
            found[skeleton.stored[parameter][0]] = value
    return found
