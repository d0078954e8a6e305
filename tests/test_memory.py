"""Memory as the system counts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
