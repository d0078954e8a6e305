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

    def seen(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if structure.centered else x

    places = [
        "what goes into its blocks is not only embeddings",
        *(f"`{name}` computes something else" for name in before.blocks),
    ]
    for place, x, y in zip(places, before.states, after.states, strict=True):
        if apart(seen(y), Q(seen(x)), routed=True) > TOLERANCE:
            behind = f"; the norm `{structure.unread[0]}` writes into the stream" if structure.unread else ""
            raise refuse(skeleton, f"{place} in another basis{behind}")
    error = apart(after.logits, before.logits, routed=True)
    if error > TOLERANCE:
        raise refuse(skeleton, "its head computes something else in another basis")
    return error
