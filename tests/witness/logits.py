"""Run by a witness's interpreter: the logits of a checkpoint as stock transformers reads it.

What its card says to type without hfquant is typed too, where there is a card that says so.

python logits.py FOLDER IDS.npy OUT.npy
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder, ids, out = sys.argv[1:]
assert not any(name.startswith("hfquant") for name in sys.modules)
config = AutoConfig.from_pretrained(folder)
stored = getattr(config, "quantization_config", None) or {}
if stored.get("quant_method") == "gptq":
    stored["backend"] = "torch"  # the plain kernel: others multiply in bfloat16
model = AutoModelForCausalLM.from_pretrained(folder, config=config, device_map="cpu", dtype=torch.float32).eval()
with torch.inference_mode():
    logits = model(torch.from_numpy(np.load(ids))).logits
blocks = re.findall(
    r"^```python\n(.*?)^```$", (Path(folder) / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)
if len(blocks) == 2:
    left = {"folder": folder}
    exec(compile(blocks[1], "README.md", "exec"), left)
    with torch.inference_mode():
        assert left["model"](torch.from_numpy(np.load(ids))).logits.isfinite().all()
print(type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__)
np.save(out, logits.float().numpy())
