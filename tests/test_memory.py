"""Memory as the system counts it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfquant import memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HELD = """
import sys
import torch, transformers
from hfquant import memory
if sys.argv[1] == "asked":
    memory.huge_pages()
large = torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup") if line.count(":") == 1)
print(fields["AnonHugePages"].split()[0], fields["Rss"].split()[0])
"""

UNMAPPED = """
import torch, transformers
from hfquant import memory
fields = lambda: {l.split(":")[0]: int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("Rss")}
code = lambda: torch.linalg.svdvals(torch.arange(9.0).view(3, 3) + torch.eye(3)).tolist()
kept, said, before = bytearray(b"7" * (8 << 20)), code(), fields()
memory.unmap_libraries()
after = fields()
assert kept == b"7" * (8 << 20) and code() == said
print(before["RssFile"], after["RssFile"], fields()["RssFile"], before["RssAnon"], after["RssAnon"])
"""


def held(word: str, **environment: str) -> tuple[int, int]:
    """MB in huge pages and in all, of a process with one tensor of 64 MB."""
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | environment
    done = subprocess.run([sys.executable, "-c", HELD, word], env=own, capture_output=True, text=True, check=True)
    huge, resident = done.stdout.split()
    return int(huge) // 1024, int(resident) // 1024


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="here the system gives huge pages to all or to none",
)
def test_large_tensors_lie_in_huge_pages_and_take_no_more_memory() -> None:
    plain, asked = held("plain"), held("asked")
    assert plain[0] == 0
    assert 32 <= asked[0] <= 64, "a machine whose memory is in pieces may have fewer"
    assert abs(asked[1] - plain[1]) <= 8
    assert held("asked", THP_MEM_ALLOC_ENABLE="0")[0] == 0, "the user's own word counts"


def test_what_somebody_else_left_out_of_collections_stays_out() -> None:
    """A test run, or a worker of the service, did so once for all; a conversion within one is not the last word."""
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        outside = gc.get_freeze_count()
        with memory.settled():
            pass
        assert gc.get_freeze_count() == outside > frozen
        gc.unfreeze()
        with memory.settled():
            assert gc.get_freeze_count() > 0
            with memory.settled():
                pass
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing happens")
def test_libraries_leave_what_only_importing_needed() -> None:
    done = subprocess.run([sys.executable, "-c", UNMAPPED], capture_output=True, text=True, check=True)
    before, after, later, own, own_after = (int(word) // 1024 for word in done.stdout.split())
    assert after < before / 4, "kilobytes of libraries' files"
    assert later < before * 0.6, "what running needs came back, and no more"
    assert abs(own_after - own) <= 8, "what the process wrote is there"
