"""A crew by its name, as the command line has it."""

from ..errors import ResourceError
from .crew import ALONE, PARTS, Crew, Devices


def crew_of(name: str | None, *, parts: int | None = None, threads: int | None = None, device: str = "cpu") -> Crew:
    """None: this process alone.  `cuda:0,cuda:1`: devices of this machine.  `ray`: the Ray cluster that this machine
    belongs to, `ray:ADDRESS` another one, `ray:local` one of this machine alone.

    parts: that calibration and weights are cut into.  threads, device: of each worker of a cluster.
    Raises ResourceError.
    """
    if name is None:
        if parts is not None or threads is not None:
            raise ResourceError("`--parts` and `--threads` are for a crew", "add `--crew`, or leave them out")
        return ALONE
    pieces = PARTS if parts is None else parts
    if name == "ray" or name.startswith("ray:"):
        from .cluster import Cluster

        address = name.partition(":")[2] or "auto"
        return Cluster(address, parts=pieces, device=device.partition(":")[0], threads=threads or 1)
    if threads is not None:
        raise ResourceError("`--threads` is for workers of a cluster", "leave it out")
    from .plan import check_device

    devices = [part.strip() for part in name.split(",")]
    for part in devices:
        check_device(part)
    return Devices(devices, pieces)
