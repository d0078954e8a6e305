"""One way of generating from disk, in a process of its own under a limit: what `offload.py` starts.

    python benchmarks/offload_ways.py '{"way": "ours", "folder": "...", ...}'

Prints one line of JSON.  `undisturbed` leaves out what the thread that computes spent waiting for a processor that
other programs had: on a machine that is shared it is what can be compared.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hfquant.machine import peak_memory


class Watch:
    """Seconds, and those of them in which this thread could have run but had no processor."""

    def __enter__(self) -> "Watch":
        self.start, self.queued, self.used = time.perf_counter(), _queued(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.undisturbed = self.seconds - (_queued() - self.queued)
        self.processor = time.process_time() - self.used

    def said(self) -> dict[str, float]:
        return {"seconds": self.seconds, "undisturbed": self.undisturbed, "processor": self.processor}


def _queued() -> float:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9


def texts(given: dict[str, Any]) -> list[list[int]]:
    return [[5 + (7 * i + j) % 900 for j in range(given["length"])] for i in range(given["prompts"])]


def ours(given: dict[str, Any]) -> dict[str, Any]:
    from hfquant.runtime.offload.cost import Workload
    from hfquant.runtime.offload.model import OffloadedModel
    from hfquant.runtime.offload.planning import Budget, plan_offload
    from hfquant.runtime.offload.policy import Policy

    said: dict[str, Any] = {}
    with OffloadedModel(given["folder"], dtype=given["dtype"] and getattr(torch, given["dtype"])) as model:
        if given["policy"]:
            policy = Policy(**given["policy"])
        else:
            work = Workload(given["prompts"], given["length"], given["new"])
            plan = plan_offload(model, work, Budget(given["limit"]))
            policy, p = plan.solved.policy, plan.solved.prediction
            said = {"predicted_seconds": p.seconds, "predicted_peak": p.peak, "bottleneck": p.decode.bottleneck}
        with Watch() as watch:
            model.adopt(policy)
            rows = model.stream(texts(given), max_new_tokens=given["new"], do_sample=False, eos_token_id=None)
            done = sum(len(tokens) for _, tokens in rows)
    return said | watch.said() | {"tokens": done, "policy": policy.to_dict()}


def accelerate(given: dict[str, Any]) -> dict[str, Any]:
    """As transformers uses it: a device map with all blocks on disk, read from the checkpoint's own files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    blocks = AutoConfig.from_pretrained(given["folder"]).num_hidden_layers
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": "disk" for i in range(blocks)}
    with tempfile.TemporaryDirectory(dir=given["folder"]) as parts:
        model = AutoModelForCausalLM.from_pretrained(
            given["folder"], device_map=places, offload_folder=parts, dtype=getattr(torch, given["dtype"])
        )
        return _in_batches(model, given)


def airllm(given: dict[str, Any]) -> dict[str, Any]:
    from airllm import AutoModel  # pip install --no-deps airllm==4.0.0
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))  # it does not load a model without one
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(given["folder"])
    with tempfile.TemporaryDirectory(dir=given["folder"]) as parts:
        model = AutoModel.from_pretrained(
            given["folder"], device="cpu", dtype=getattr(torch, given["dtype"]), layer_shards_saving_path=parts
        )
        return _in_batches(model, given)


def _in_batches(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    rows, done, size = texts(given), 0, given["batch"]
    with Watch() as watch:
        for at in range(0, len(rows), size):
            ids = torch.tensor(rows[at : at + size])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=given["new"], do_sample=False,
                eos_token_id=None, pad_token_id=0, use_cache=True,
            )  # fmt: skip
            done += out[:, ids.shape[1] :].numel()
    return watch.said() | {"tokens": done, "policy": {"batch": size}}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    if asked.get("group"):
        Path(asked["group"]).write_text(str(os.getpid()))
    elif asked["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["limit"],) * 2)
    found = {"ours": ours, "accelerate": accelerate, "airllm": airllm}[asked["way"]](asked)
    print(json.dumps(found | {"peak": peak_memory()}))
