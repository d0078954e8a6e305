"""Run by a witness's interpreter: the logits of a checkpoint as stock transformers reads it.

python logits.py FOLDER IDS.npy OUT.npy
"""

import sys

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
print(type(model.get_submodule("model.layers.0.mlp.down_proj")).__name__)
np.save(out, logits.float().numpy())
