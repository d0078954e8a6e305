"""Time and memory of a plan for many models, with recorded answers of the Hub.

python benchmarks/fleet.py [--models 10000] [--out benchmarks/results/fleet]
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reporting import write

from hfquant.conversion.fleet import status
from hfquant.conversion.fleet.reconcile import make_plan
from hfquant.conversion.fleet.sight import Original
from hfquant.machine import hardware, peak_memory, versions
from tests.conversion.fleet.recorded import Recorded, made, manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    originals = {f"org/m{i}": Original(f"org/m{i}", f"{i:040x}", 10**9, {"license": "mit"}) for i in range(args.models)}
    results = {}
    for i in range(args.models):
        if i % 3:  # a third is missing, a third stale, a third up to date
            results[f"acme/m{i}-rtn-w8"] = made(f"org/m{i}", f"{i if i % 3 == 1 else i + 1:040x}", "rtn-w8")
    fleet = manifest(models=[{"search": {"author": "org"}, "recipes": ["rtn-w8"], "limit": min(args.models, 10_000)}])
    before = peak_memory()
    start, used = time.perf_counter(), time.process_time()
    plan = make_plan(fleet, Recorded(originals, results))
    text = json.dumps(status.document(plan))
    row = {
        "models": args.models,
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "peak_MB": round(peak_memory() / 1e6),
        "of_which_before_MB": round(before / 1e6),
        "document_MB": round(len(text) / 1e6, 1),
        "counts": plan.counts(),
    }
    print(row)
    if args.out:
        write(args.out, {"rows": [row], "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
