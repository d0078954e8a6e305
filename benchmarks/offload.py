"""Throughput of generation from disk at the same enforced budget: hfquant's schedule against accelerate's disk offload.

    python benchmarks/offload.py [--gigabytes 2.4] [--limit 1000MB] [--out benchmarks/results/offload]

Builds a Llama-type model with random bfloat16 weights and answers the same prompts in a process per way, each under
RLIMIT_DATA, so that the system, not this script, enforces the limit.  A helper evicts the model's files from the page
cache ten times a second: the memory that is not allowed does not help through the back door.  accelerate is run with
several batch sizes, and its best counts.  Times are those of generation alone, after loading.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hfquant.cli.units import read_size
from hfquant.machine import hardware, versions
from hfquant.tensors.shards import Entry, write_checkpoint

WIDTH, INNER, HEADS, VOCABULARY = 1536, 4608, 12, 1024
COMMON = """
import json, resource, sys, time
import torch
from hfquant.machine import peak_memory
folder, limit, prompts, length, new, batch = sys.argv[1], *map(int, sys.argv[2:7])
texts = [[5 + (7 * i + j) % 900 for j in range(length)] for i in range(prompts)]
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
said = {}
"""
OURS = (
    COMMON
    + """
from hfquant.runtime.offload.cost import Workload
from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.planning import Budget, plan_offload
from hfquant.runtime.offload.policy import Policy
fixed = json.loads(sys.argv[7])
with OffloadedModel(folder) as model:
    if fixed:
        policy = Policy(**fixed)
    else:
        plan = plan_offload(model, Workload(prompts, length, new), Budget(limit))
        policy, p = plan.solved.policy, plan.solved.prediction
        said = {"predicted_seconds": p.seconds, "predicted_peak": p.peak, "bottleneck": p.decode.bottleneck}
    model.adopt(policy)
    start = time.perf_counter()
    done = sum(len(t) for _, t in model.stream(texts, max_new_tokens=new, do_sample=False, eos_token_id=None))
    said |= {"seconds": time.perf_counter() - start, "tokens": done, "policy": policy.to_dict()}
print(json.dumps(said | {"peak": peak_memory()}))
"""
)
ACCELERATE = (
    COMMON
    + """
import tempfile
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(folder)
with init_empty_weights(include_buffers=False):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.tie_weights()
places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
places |= {f"model.layers.{i}": "disk" for i in range(config.num_hidden_layers)}
with tempfile.TemporaryDirectory(dir=folder) as parts:
    model = load_checkpoint_and_dispatch(model, folder, places, offload_folder=parts, dtype=torch.bfloat16)
    done, start = 0, time.perf_counter()
    for at in range(0, prompts, batch):
        ids = torch.tensor(texts[at : at + batch])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                             eos_token_id=None, pad_token_id=0)
        done += out[:, length:].numel()
    said = {"seconds": time.perf_counter() - start, "tokens": done, "policy": {"batch": batch}}
print(json.dumps(said | {"peak": peak_memory()}))
"""
)


def build(folder: Path, blocks: int) -> int:
    """-> bytes of weights"""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3, vocab_size=VOCABULARY, dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).mul_(0.02).bfloat16()

    torch.manual_seed(0)
    plan = [Entry(n, s, torch.bfloat16, lambda s=s: make(s)) for n, s in shapes.items() if n != "lm_head.weight"]
    write_checkpoint(folder, plan, max_shard_size=60_000_000)
    return sum(e.nbytes for e in plan)


def evict(folder: Path) -> None:
    """Keep the files of a folder out of the page cache, for ever."""
    os.sync()
    while True:
        for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.dat")]:
            try:
                fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        time.sleep(0.1)


def child(
    script: str, folder: Path, limit: int, work: tuple[int, int, int], batch: int, policy: dict[str, int]
) -> dict:
    arguments = [folder, limit, *work, batch, json.dumps(policy)]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    said = json.loads(done.stdout.splitlines()[-1])
    return said | {"tokens_per_second": said["tokens"] / said["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--limit", type=read_size, default="1000MB")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--model", type=Path, help="where the model is built, or is since an earlier run")
    parser.add_argument("--only", default="", help="run only the ways with this in their names; keep other results")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offload"))
    given = parser.parse_args()
    limit = given.limit if isinstance(given.limit, int) else read_size(given.limit)
    block = 2 * (WIDTH * WIDTH * 8 // 3 + 3 * WIDTH * INNER)
    work = (given.prompts, given.prompt_len, given.gen_len)
    before = given.out.with_suffix(".json")
    rows = json.loads(before.read_text())["rows"] if given.only and before.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.model or Path(temporary) / "model"
        if not folder.is_dir():
            build(folder, round(given.gigabytes * 1e9 / block))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        helper = multiprocessing.Process(target=evict, args=(folder,), daemon=True)
        helper.start()
        for name, script, batch, policy in ways(given.prompts):
            if given.only not in name:
                continue
            rows |= measured(name, script, folder, limit, work, batch, policy)
        helper.terminate()
    settings = {"weights_bytes": weights, "limit_bytes": limit, "prompts": work[0], "prompt_len": work[1],
                "gen_len": work[2]}  # fmt: skip
    write(given.out, {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": rows})


def measured(name: str, script: str, folder: Path, limit: int, *rest: Any) -> dict[str, dict]:
    """One way under the limit, and where it fails also without."""
    rows = {name: child(script, folder, limit, *rest)}
    print(name, rows[name], flush=True)
    if "failed" in rows[name]:
        name += ", no limit"
        rows[name] = child(script, folder, 0, *rest)
        print(name, rows[name], flush=True)
    return rows


def ways(prompts: int) -> list[tuple[str, str, int, dict[str, int]]]:
    """(name, script, batch of accelerate, policy of ours or {} for the solved one)"""
    mine: list[tuple[str, dict[str, int]]] = [
        ("hfquant, solved policy", {}),
        ("hfquant, zig-zag, all weights on disk", {"batch": 32, "batches": 3, "depth": 2}),
        ("hfquant, the same without overlap", {"batch": 32, "batches": 3, "depth": 0}),
        ("hfquant, row by row", {"batch": 32, "batches": 1, "depth": 2}),
    ]
    theirs = [batch for batch in (32, 96) if batch <= prompts]
    return [(name, OURS, 0, policy) for name, policy in mine] + [
        (f"accelerate, batch {batch}", ACCELERATE, batch, {}) for batch in theirs
    ]


def write(out: Path, result: dict) -> None:
    best = max(
        (r["tokens_per_second"] for n, r in result["rows"].items() if n.startswith("accelerate") and "tokens" in r),
        default=0.0,
    )
    s, h = result["settings"], result["hardware"]
    lines = [
        f"Weights {s['weights_bytes'] / 1e9:.2f} GB in bfloat16, {s['limit_bytes'] / 1e6:.0f} MB of memory enforced, "
        f"{s['prompts']} prompts of {s['prompt_len']} tokens, {s['gen_len']} new ones each.",
        f"{h['processor']}, {h['threads']} thread.",
        "",
        "| | tokens/s | seconds | peak MB | against accelerate's best |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | fails: {row['failed']} | | | |")
            continue
        ratio = f"{row['tokens_per_second'] / best:.2f}x" if best else ""
        numbers = f"{row['tokens_per_second']:.2f} | {row['seconds']:.1f} | {row['peak'] / 1e6:.0f}"
        lines.append(f"| {name} | {numbers} | {ratio} |")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
