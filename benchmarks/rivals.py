"""A rival beside hfquant: the same model, calibration tokens and test windows, one after the other in one run.

    python benchmarks/rivals.py MODEL --rival-python ENV/bin/python --calibration CAL.txt --text TEST.txt --out RESULT \
        [--rival autoround:iters=50,lr=5e-3] [--recipe gptq-w4g64+lkd,lkd.steps=20 ...]

--recipe: of hfquant, with its options; gptq of the same grid where none is given.

ENV: an environment of its own with `gptqmodel` (7.6.0 pins another numpy) or `auto-round`.  Both get the same threads
(OMP_NUM_THREADS).  Timed: quantization and saving, without the import of libraries.  The peak is the process's.
On a machine that does other work too, compare processor seconds: of all threads, of this process alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from reporting import write
from transformers import AutoTokenizer

from hfquant.machine import hardware, versions
from hfquant.measure.text import cut, read_text
from hfquant.model.calibration import token_batches

PEAK = "int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024"
OURS = f"""
import json, sys, time
from hfquant.compress import compress
from hfquant.recipe import Recipe
model, tokens, out, recipe, bits, group = sys.argv[1:]
recipe, *changes = recipe.split(",")
recipe = Recipe.parse(recipe, changes)
start, used = time.perf_counter(), time.process_time()
for _ in compress(model, recipe, out, calibration=tokens, samples=64, seq_len=512): pass
print(json.dumps({{"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "peak": {PEAK}}}))
"""
# its default recipe: group-aware order, no activation order
GPTQMODEL = f"""
import json, sys, time
import numpy as np, torch
from gptqmodel import GPTQModel, QuantizeConfig
model, tokens, out, recipe, bits, group = sys.argv[1:]
rows = np.load(tokens)[: 64 * 512].reshape(64, 512)
data = [{{"input_ids": r.tolist(), "attention_mask": [1] * len(r)}} for r in rows]
start, used = time.perf_counter(), time.process_time()
loaded = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=int(group)))
loaded.quantize(data, batch_size=1)
loaded.save(out)
print(json.dumps({{"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "peak": {PEAK}}}))
"""
AUTOROUND = f"""
import json, sys, time
import numpy as np, torch
from auto_round import AutoRound
model, tokens, out, options, bits, group = sys.argv[1:]
rows = torch.from_numpy(np.load(tokens)[: 64 * 512].reshape(64, 512))
data = torch.utils.data.DataLoader([dict(input_ids=r, attention_mask=torch.ones_like(r)) for r in rows], batch_size=8)
start, used = time.perf_counter(), time.process_time()
made = AutoRound(model, scheme="W4A16", bits=int(bits), group_size=int(group), nsamples=64, seqlen=512, dataset=data,
                 device_map="cpu", **json.loads(options))
made.quantize_and_save(out, format="auto_round:auto_gptq")
print(json.dumps({{"seconds": time.perf_counter() - start, "cpu": time.process_time() - used, "peak": {PEAK}}}))
"""
SCORE_OURS = "import hfquant, sys, torch; model = hfquant.load(sys.argv[1], dtype=torch.float32)"
# its kernels take no float32
SCORE_GPTQMODEL = (
    "import sys, torch; from gptqmodel import GPTQModel, BACKEND\n"
    "model = GPTQModel.load(sys.argv[1], backend=BACKEND.TORCH, device='cpu', dtype=torch.bfloat16).model"
)
# dequantized here: its own layers compute in float16, and what it exports as `fake` are the original's weights
SCORE_AUTOROUND = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
folder = next(Path(sys.argv[1]).rglob("quantization_config.json")).parent
told = json.loads((folder / "quantization_config.json").read_text())
assert told["packing_format"] == "auto_round:auto_gptq", told
stored = load_file(folder / "model.safetensors")
per, top = 32 // told["bits"], 2 ** told["bits"] - 1
shifts = told["bits"] * torch.arange(per)
for name in [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]:
    q, z, s = (stored.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
    q = (q[:, None] >> shifts[:, None] & top).flatten(0, 1)
    z = (z[..., None] >> shifts & top).flatten(1) + 1
    group = len(q) // len(s)
    stored[f"{name}.weight"] = ((q - z.repeat_interleave(group, 0)) * s.float().repeat_interleave(group, 0)).T
config = AutoConfig.from_pretrained(folder)
del config.quantization_config
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
missing, unexpected = model.load_state_dict(stored, strict=False)
assert not unexpected and set(missing) <= set(model._tied_weights_keys), (missing, unexpected)
"""
PERPLEXITY = """
import json, numpy as np
windows, total = torch.from_numpy(np.load(sys.argv[2])), 0.0
with torch.no_grad():
    for w in windows:
        total += float(torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1].float(), w[1:]))
print(json.dumps(float(np.exp(total / len(windows)))))
"""


def child(python: str, code: str, *arguments: str) -> object:
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="rival-") as here:  # GPTQModel writes logs where it is started
        done = subprocess.run(
            [python, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=here
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def rival(args: argparse.Namespace) -> tuple[str, str, str, str, str]:
    """Its name, its Python, what makes and what measures a model, and what it is told."""
    name, _, changes = args.rival.partition(":")
    if name == "gptqmodel":
        return "GPTQModel 7.6.0", args.rival_python, GPTQMODEL, SCORE_GPTQMODEL, f"gptq-w{args.bits}g{args.group}"
    options = {
        key: json.loads(value) for key, _, value in (change.partition("=") for change in changes.split(",") if change)
    }
    return "AutoRound 0.16.1", args.rival_python, AUTOROUND, SCORE_AUTOROUND, json.dumps(options)


def beside(doc: str) -> argparse.ArgumentParser:
    """What every comparison with a rival is told: the model, the rival's Python, both texts, and where to write."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rival-python", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main() -> None:
    parser = beside(str(__doc__))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rival", default="gptqmodel", help="or autoround[:iters=N,lr=R]")
    parser.add_argument("--recipe", action="append", default=[])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    settings = {"model": Path(args.model).name, "calibration": Path(args.calibration).name + ", 64 x 512 tokens",
                "text": Path(args.text).name + ", first 64 windows of 512, float32", "threads": torch.get_num_threads(),
                "hardware": hardware(), "versions": versions()}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="rivals-") as work:
        tokens, windows = f"{work}/tokens.npy", f"{work}/windows.npy"
        np.save(tokens, token_batches(args.calibration, tokenizer, samples=64, seq_len=512, seed=0).numpy().reshape(-1))
        np.save(windows, cut(read_text(args.text), tokenizer, 512, 64).numpy())
        recipes = args.recipe or [f"gptq-w{args.bits}g{args.group}"]
        tools = [("hfquant", sys.executable, OURS, SCORE_OURS, each) for each in recipes]
        tools.append(rival(args))
        for i, (name, python, code, score, recipe) in enumerate(tools):
            out = f"{work}/{i}"
            model = str(Path(args.model).absolute())
            found = child(python, code, model, tokens, out, recipe, str(args.bits), str(args.group))
            assert isinstance(found, dict)
            size = sum(f.stat().st_size for f in Path(out).rglob("*.safetensors"))
            perplexity = child(python, score + PERPLEXITY, out, windows)
            rows.append(
                {"tool": name, "recipe": recipe, "seconds": round(found["seconds"], 1),
                 "processor_seconds": round(found["cpu"], 1),
                 "peak_MB": round(found["peak"] / 1e6), "MB": round(size / 1e6, 1), "perplexity": perplexity}
            )  # fmt: skip
            print(rows[-1], flush=True)
            write(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
