"""The calibration phase of one block (sums over what its layers read, then its outputs) by crews of one-thread workers.

python benchmarks/cluster.py [--workers 1 2] [--out benchmarks/results/cluster]
python benchmarks/cluster.py --workers 0      alone, also on versions without crews: PYTHONPATH=other/checkout

Wall time, the least of several rounds, in turn; and processor time of all processes, which others on the same machine
do not lengthen.  efficiency: time of one worker / (time of n, times n).  Needs `ray` for more than 0 workers.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import write
from synthetic import Shape, build

from hfquant.compress.observe import discover
from hfquant.compress.streaming import Passage, Streamer
from hfquant.machine import hardware, versions
from hfquant.model.blocks import weights
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source


def timed(job: Any, device: str, shared: Any, *part: Any) -> tuple[Any, float]:
    """A job, and the processor seconds that it took."""
    start = time.process_time()
    return job(device, shared, *part), time.process_time() - start


def crew_of(workers: int, parts: int) -> Any:
    """One on a Ray cluster of this machine that counts its processor time."""
    from hfquant.compress.cluster import Cluster

    class Counting(Cluster):
        used = 0.0

        def each(self, job: Any, shared: Any, parts: Iterable[Sequence[Any]], stay: int = 0) -> Iterator[Any]:
            for found, seconds in super().each(partial(timed, job), shared, parts, stay):
                self.used += seconds
                yield found

    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    ray.shutdown()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return Counting("auto", parts=parts)


def phase(block: Any, passage: Passage, folder: Path, groups: Any) -> None:
    """What is measured."""
    if getattr(passage, "crew", None) is None or passage.crew.parts == 1:
        from hfquant.compress.observe import observe

        observe(block, passage, 0, groups)
    else:
        from hfquant.compress import together

        passage.shards = None
        together.observe(block, passage, 0, groups, {}, {})
    passage.run(block, 0, folder / "out")


@torch.no_grad()
def measure(passage: Passage, block: Any, folder: Path, workers: int, args: argparse.Namespace) -> dict[str, Any]:
    groups = discover(block, passage, 0, weights(block))
    crew = crew_of(workers, args.parts) if workers else None
    if crew is not None:
        passage.crew = crew
        phase(block, passage, folder, groups)  # workers begin, and import
        crew.used = 0.0
    rounds, own = [], resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for _ in range(args.rounds):
        start = time.perf_counter()
        phase(block, passage, folder, groups)
        rounds.append(time.perf_counter() - start)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_utime - own
    return {
        "workers": workers,
        "seconds": round(min(rounds), 3),
        "rounds": [round(r, 3) for r in rounds],
        "processor_seconds": round((own + (crew.used if crew else 0.0)) / args.rounds, 3),
        "of_which_lead": round(own / args.rounds, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(width=args.width, inner=args.width * 3)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model", 1, shape)
        for workers in args.workers:
            skeleton = Skeleton(open_source(folder / "model"), torch.float32)
            tokens = torch.randint(0, shape.vocabulary, (args.samples, args.seq_len))
            # the same batches for all
            streamer = Streamer(skeleton, tokens, folder / f"work{workers}", max(1, args.samples // args.parts // 2))
            passage = next(streamer.passages())
            block = skeleton.load_module(passage.stack.blocks[0])
            rows.append(measure(passage, block, folder, workers, args))
            print(rows[-1], flush=True)
    one = next((row for row in rows if row["workers"] == 1), None)
    for row in rows if one else ():
        if row["workers"]:
            n = row["workers"]
            row["efficiency"] = round(one["seconds"] / (n * row["seconds"]), 3)
            row["efficiency_by_processor"] = round(one["processor_seconds"] / row["processor_seconds"], 3)
            print(n, row["efficiency"], row["efficiency_by_processor"])
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "workers")}
        write(args.out, {"rows": rows, "settings": settings, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
