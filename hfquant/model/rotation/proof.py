"""That a rotated model computes what the original does."""

from torch import Tensor

from ...tensors.hadamard import Rotation
from ..skeleton import Skeleton
from ..trace import apart
from .run import Run
from .structure import Structure, refuse

TOLERANCE = 1e-3  # relative, of all tokens but the worst: float32 stays below 1e-4, what is not exact comes above 1e-2


def prove(skeleton: Skeleton, before: Run, after: Run, Q: Rotation, structure: Structure) -> float:
    """‖y − y'‖ / ‖y‖ of the logits.  Raises SourceError with the name of the first block that does not turn."""

    def turned(x: Tensor) -> Tensor:
        return Q(_centered(x) if structure.centered else x)

    def seen(x: Tensor) -> Tensor:
        return _centered(x) if structure.centered else x

    assert before.after is not None and after.after is not None
    assert before.logits is not None and after.logits is not None
    names = list(before.states)
    into = [*(before.states[name] for name in names), before.after]
    now = [*(after.states[name] for name in names), after.after]
    places = ["what goes into its blocks is not only embeddings", *(f"`{n}` computes something else" for n in names)]
    for place, x, y in zip(places, into, now, strict=True):
        if apart(seen(y), turned(x), routed=True) > TOLERANCE:
            raise refuse(skeleton, f"{place} in another basis")
    error = apart(after.logits.float(), before.logits.float(), routed=True)
    if error > TOLERANCE:
        raise refuse(skeleton, "its head computes something else in another basis")
    return error


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
