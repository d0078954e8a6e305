"""Is the cost model true?  Predicted and measured time and peak of many policies, and of the one that is chosen.

    python benchmarks/offload_policies.py [--blocks 12] [--out benchmarks/results/offload_policies]

Every policy runs in this process on a model with random weights, in the order of a shuffled list.  Compared is the time
undisturbed by other programs (see `offload_ways.py`); the peak is the process's.  The chosen policy is compared with
the best of the whole sweep that keeps the same budget.
"""

import argparse
import gc
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from offload_ways import Watch
from reporting import write
from synthetic import build, evicting

from hfquant.machine import hardware, versions
from hfquant.memory import give_back
from hfquant.runtime.offload.cost import CostModel, Workload
from hfquant.runtime.offload.hardware import profile
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.planning import MARGIN, cost_model
from hfquant.runtime.offload.policy import EVERY_LAYER, Policy
from hfquant.runtime.offload.solve import solve

FIXED = {
    "one prompt at a time": Policy(1, 1, depth=1),
    "row by row": Policy(8, 1, depth=1),
    "row by row, no overlap": Policy(8, 1, depth=0),
    "large rows": Policy(32, 1, depth=1),
    "large rows, no overlap": Policy(32, 1, depth=0),
    "zig-zag": Policy(8, 6, depth=1),
    "zig-zag, no overlap": Policy(8, 6, depth=0),
    "zig-zag, half the weights": Policy(16, 3, weights=-2, depth=2),
    "all weights": Policy(16, 3, weights=1 << 40),
    "one batch of all": Policy(48, 1, depth=1),
    "cache on disk": Policy(16, 3, cache_on_disk=EVERY_LAYER),
    "cache of 4 bit": Policy(16, 3, cache_bits=4),
}


def sweep(cost: CostModel, work: Workload, memory: int) -> list[Policy]:
    """All policies of a grid that keep the budget, with as many weights in memory as it allows."""
    found = []
    for batch in (4, 8, 16, 24, 48):
        for batches in (1, 2, 3, 6, 12):
            if batch * batches > work.prompts:
                continue
            for depth in (1,):
                policy = Policy(batch, batches, 0, 0, 16, depth)
                room = memory - cost.peak(policy, work)
                if room >= 0:
                    found.append(replace(policy, weights=room))
    return found


def measured(model: OffloadedModel, policy: Policy, work: Workload) -> dict[str, float]:
    prompts = [[5 + (7 * i + j) % 900 for j in range(work.prompt)] for i in range(work.prompts)]
    model.let_go()
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with Watch() as watch:
        model.adopt(policy)
        done = sum(
            len(tokens)
            for _, tokens in model.stream(prompts, max_new_tokens=work.new, do_sample=False, eos_token_id=None)
        )
    assert done == work.prompts * work.new
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return watch.said() | {"peak": int(status["VmHWM"].split()[0]) * 1024}


def row(model: OffloadedModel, cost: CostModel, policy: Policy, work: Workload, repeats: int) -> dict[str, Any]:
    predicted = cost.predict(policy, work)
    runs = [measured(model, policy, work) for _ in range(repeats)]
    best = min(runs, key=lambda run: run["undisturbed"])
    found = {
        "policy": policy.to_dict(), "predicted": predicted.seconds, "bottleneck": predicted.decode.bottleneck,
        "predicted_peak": predicted.peak, **best, "peak": max(run["peak"] for run in runs),
    }  # fmt: skip
    said = {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}
    print(policy, said, f"peak {predicted.peak / 1e6:.0f} / {found['peak'] / 1e6:.0f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--memory", type=int, default=900_000_000)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--gen-len", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offload_policies"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = Workload(given.prompts, given.prompt_len, given.gen_len)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = build(folder, given.blocks)
        with evicting(folder), OffloadedModel(folder, dtype=torch.float32) as model:
            machine = profile(Path(temporary), fresh=True)
            cost = cost_model(model, work, given.memory, machine, Policy())
            compressed = cost_model(model, work, given.memory, machine, Policy(cache_bits=4))
            half = cost.place.total // 2
            chosen = solve(cost, work, given.memory, margin=MARGIN).policy
            policies = {name: replace(p, weights=half) if p.weights == -2 else p for name, p in FIXED.items()} | {
                f"sweep {p.batch} x {p.batches}": p for p in sweep(cost, work, given.memory - MARGIN)
            }
            policies["chosen"] = chosen
            names = [name for name in policies if given.only in name]
            random.Random(0).shuffle(names)
            for name in names:
                about = cost if policies[name].cache_bits == 16 else compressed
                rows[name] = row(model, about, policies[name], work, given.repeats)
    settings = {
        "weights_bytes": size, "dtype": "bfloat16 on disk, computed in float32", "memory_bytes": given.memory,
        "prompts": work.prompts, "prompt_len": work.prompt, "gen_len": work.new, "repeats": given.repeats,
        "disk_read": 1 / cost.feed.seconds, "load": psutil.getloadavg()[1],
    }  # fmt: skip
    result = {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": rows}
    write(given.out, result, table(result))


def table(result: dict[str, Any]) -> str:
    s, rows = result["settings"], result["rows"]
    lines = [
        f"Weights {s['weights_bytes'] / 1e6:.0f} MB ({s['dtype']}), {s['prompts']} prompts of {s['prompt_len']} tokens,"
        f" {s['gen_len']} new ones each; one thread, {s['disk_read'] / 1e9:.2f} GB/s from disk to where it is used.",
        f"Seconds are the better of {s['repeats']} runs, without waiting for a processor that other programs had.",
        "",
        "| | batch x batches | weights kept, MB | predicted s | measured s | error | predicted peak, MB | peak, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(rows, key=lambda n: (n.startswith("sweep"), n == "chosen", n)):
        r, p = rows[name], rows[name]["policy"]
        lines.append(
            f"| {name} | {p['batch']} x {p['batches']} | {min(p['weights'], 2 * s['weights_bytes']) / 1e6:.0f} | "
            f"{r['predicted']:.2f} | {r['undisturbed']:.2f} | {r['predicted'] / r['undisturbed'] - 1:+.0%} | "
            f"{r['predicted_peak'] / 1e6:.0f} | {r['peak'] / 1e6:.0f} |"
        )
    swept = [r["undisturbed"] for name, r in rows.items() if name.startswith("sweep")]
    if swept and "chosen" in rows:
        ratio = rows["chosen"]["undisturbed"] / min(swept)
        lines += ["", f"The chosen policy takes {ratio:.2f} of the time of the best of {len(swept)} in the sweep."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
