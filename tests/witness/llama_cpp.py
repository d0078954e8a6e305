"""Run by a witness's interpreter: what llama.cpp makes of a GGUF file.

python llama_cpp.py MODEL.gguf TEXT IDS.json -> {"tokens": of the text, "next": {i: log p(ids[i] | ids[:i])}}
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

file, text, ids_file = sys.argv[1:]
FIRST = 32


def ask(url: str, path: str, **what: object) -> dict:
    request = urllib.request.Request(url + path, json.dumps(what).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


params = xllamacpp.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel = 256, 1
server = xllamacpp.Server(params)  # held: it ends when nobody does
url = server.listening_address
tokens = ask(url, "/tokenize", content=Path(text).read_text(), add_special=False)["tokens"]
ids = json.loads(Path(ids_file).read_text())
found = {}
for i in range(FIRST, len(ids)):
    said = ask(url, "/completion", prompt=ids[:i], n_predict=1, n_probs=1000, temperature=0.0, cache_prompt=True)
    for told in said.get("completion_probabilities", ())[:1]:  # none where the likeliest token ends the text
        for token in told["top_logprobs"]:
            if token["id"] == ids[i]:
                found[i] = token["logprob"]
print(json.dumps({"tokens": tokens, "next": found}), flush=True)
