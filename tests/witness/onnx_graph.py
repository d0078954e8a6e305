"""Run by a witness's interpreter: the logits of an ONNX graph as onnxruntime computes them.

python onnx_graph.py MODEL.onnx IDS.npy OUT.npy
"""

import sys

import numpy as np
import onnxruntime

file, ids, out = sys.argv[1:]
assert not {"torch", "transformers", "hfquant"} & sys.modules.keys()
inputs = np.load(ids)
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
[logits] = session.run(["logits"], {"input_ids": inputs, "attention_mask": np.ones(inputs.shape, np.int64)})
np.save(out, logits)
