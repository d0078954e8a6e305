"""The child's side of the sandbox: shut the doors, then do one task, and tell of it.

Nothing is imported before the doors are shut but what Python itself brings.  See `sandbox.py`.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG = 1

Tell = Callable[[Mapping[str, Any]], None]


def main() -> NoReturn:
    """Read a task from stdin, do it, and leave; the exit code is 0 if it was done."""
    heard, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print belongs into the log
    lock = threading.Lock()

    def tell(document: Mapping[str, Any]) -> None:
        with lock:
            said.write(json.dumps(dict(document), default=str).encode() + b"\n")
            said.flush()

    order = json.loads(heard.readline())
    network = shut()
    # after the network, which one thread alone can leave, and before the limits: Python waits for ever for a thread
    # that finds no memory to begin with
    if order["task"]["name"] != "layouts":  # that one reads more
        threading.Thread(target=_die_with_worker, args=(heard,), daemon=True).start()
    if sys.platform != "win32":
        limit(order["bounds"])
    tell({"event": "started", "network": network})
    code = 1
    try:
        from .tasks import TASKS

        gc.freeze()  # a hundred thousand objects that stay: memory is given back more often than they are looked at
        tell({"event": "done", "result": TASKS[order["task"]["name"]](order["task"], tell, heard)})
        code = 0
    except BaseException as error:  # of Rust too, whose panics are no Exceptions
        tell({"event": "failed", **explained(error)})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no waiting for threads that a library left


def _die_with_worker(heard: Any) -> None:
    """The worker holds the other end of stdin for as long as it lives."""
    while heard.read(1 << 16):
        pass
    os.killpg(0, signal.SIGKILL)


def explained(error: BaseException) -> dict[str, Any]:
    """An error as the job's owner will see it.  What is not theirs to correct goes to the log in full."""
    from ..errors import HfquantError

    if isinstance(error, HfquantError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"kind": "ResourceError", "message": "the job's memory was not enough", "hint": "use a smaller model"}
    if isinstance(error, OSError) and error.errno in FULL:
        return {"kind": "ResourceError", "message": FULL[error.errno], "hint": "use a smaller model, or try later"}
    traceback.print_exception(error)
    return {
        "kind": "Bug",
        "message": f"the work failed: {type(error).__name__}",
        "hint": "the log says more; the model may be damaged or made to cause harm, or hfquant has a bug",
    }


FULL = {28: "the disk is full", 27: "a file grew larger than the job may write", 122: "the disk quota is used up"}


def shut() -> str:
    """No network, death with the worker -> how the network was shut."""
    os.umask(0o077)
    network = "refused by Python"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):  # who may not, is killed like everybody else when memory runs out
            Path("/proc/self/oom_score_adj").write_text("1000")
        if _leave_network():
            network = "none"
    sys.addaudithook(_no_network)
    return network


def limit(bounds: Mapping[str, Any]) -> None:
    """Have the system enforce `Bounds`, on this process and those it begins."""
    import resource

    wanted = {
        "RLIMIT_DATA": bounds.get("memory"),
        "RLIMIT_FSIZE": bounds.get("file"),
        "RLIMIT_CPU": bounds.get("cpu"),
        "RLIMIT_CORE": 0,
    }
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error from `write` can be explained
    for name, value in wanted.items():
        if value is not None and hasattr(resource, name):
            _, most = resource.getrlimit(getattr(resource, name))
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(getattr(resource, name), (value, value))


def _leave_network() -> bool:
    """Move to a network namespace that has nothing in it, as the user of one if need be; whether that was allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    with suppress(OSError):  # without a name in there, files still belong to whom they did
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Also where the kernel does not do it: no connections from Python, but for those within the machine's files."""
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.bind"):
        raise PermissionError(f"no network in here ({event})")


if __name__ == "__main__":
    main()
