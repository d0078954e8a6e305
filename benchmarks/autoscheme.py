"""Bits chosen by AutoRound's AutoScheme beside hfquant's own choice: equal average, rounded alike, on held-out text.

    python benchmarks/autoscheme.py MODEL --rival-python ENV/bin/python --calibration CAL.txt --text HELD_OUT.txt \
        --out RESULT.json --average 3.5 [--average 3]

ENV: an environment of its own with `auto-round`.  Both choose among 2, 3, 4 and 8 bit, with one size of groups (-1: one
scale for every output channel), layer by layer, looking at the same text; embeddings stay.  AutoScheme is given as many
sequences as hfquant looks at in all, of which that judges layers by a third and has them learn from the others.  What
either chose is rounded by GPTQ, with the same calibration, and stored in the same format, so that what differs is the
choice.  AutoScheme counts bits for zero points that symmetric grids do not have; it is given as many more.  Its
`look_seconds` are with rounding to nearest.  It leaves alone layers whose widths are no multiples of 32.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from budget import Bench, everywhere
from reporting import write
from rivals import beside, child

from hfquant.budget import Case, decide, open_case, table_of
from hfquant.budget.candidates import ENDS
from hfquant.machine import hardware, versions
from hfquant.measure.text import read_text
from hfquant.recipe import GridSpec

BITS = (2, 3, 4, 8)
CHOOSE = """
import json, sys, time
from auto_round import AutoRound
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme
from auto_round.schemes import QuantizationScheme
model, texts, average, samples, seq_len, group, *bits = sys.argv[1:]
kinds = [{"bits": int(b), "group_size": int(group), "sym": True, "data_type": "int", "act_bits": 16} for b in bits]
like = {"nsamples": int(samples), "seqlen": int(seq_len), "dataset": texts, "device_map": "cpu"}
scheme = AutoScheme(avg_bits=float(average), options=[QuantizationScheme.from_dict(kind) for kind in kinds],
                    low_gpu_mem_usage=False, enable_torch_compile=False, **like)
used = time.process_time()
made = AutoRound(model, scheme=scheme, iters=0, **like)
made.quantize()  # to nearest, which is quick
spent = time.process_time() - used
print(json.dumps({"seconds": spent, "bits": {name: told["bits"] for name, told in made.layer_config.items()}}))
"""


def theirs(options: argparse.Namespace, texts: Path, average: float, case: Case, sequences: int) -> dict[str, Any]:
    """What AutoScheme chooses: bits by layer, and its processor seconds."""
    scales = stored({row.layer: 4 for row in case.table.rows}, options.group, case) - 4
    with_zeros = average + (average - scales) * scales / 16
    looked = (str(sequences), str(options.seq_len), str(options.group), *map(str, BITS))
    model = str(Path(options.model).absolute())
    found = child(options.rival_python, CHOOSE, model, str(texts), str(with_zeros), *looked)
    assert isinstance(found, dict)
    return found


def recipe_of(bits: dict[str, int], group: int, layers: list[str]) -> dict[str, Any]:
    """The recipe that gives layers these bits.  Raises KeyError for a layer of which nothing was said."""
    overrides = {layer: {"bits": bits[layer], "group_size": group} for layer in layers}
    return everywhere({"bits": 4, "group_size": group}) | {"overrides": overrides}


def stored(bits: dict[str, int], group: int, case: Case) -> float:
    """Bits per weight with scales, inside the blocks."""
    rows = [row for row in case.table.rows if row.layer in bits and row.kind not in ENDS]
    wanted = {row.layer: GridSpec(bits=bits[row.layer], group_size=group) for row in rows}
    data = sum(next(o.data for o in row.options if o.grid == wanted[row.layer]) for row in rows)
    return 8 * data / sum(row.weights for row in rows)


def main() -> None:
    parser = beside(str(__doc__))
    parser.add_argument("--average", type=float, action="append", required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    options.groups, options.keep = [options.group], None
    torch.manual_seed(0)
    told = {"model": Path(options.model).name, "calibration": Path(options.calibration).name,
            "text": Path(options.text).name, "samples": options.samples, "seq_len": options.seq_len,
            "windows": options.windows, "bits": BITS, "group": options.group, "rival": "AutoRound 0.16.1",
            "threads": torch.get_num_threads(), "hardware": hardware(), "versions": versions()}  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bench = Bench(options, work)
        texts = work / "texts.json"
        text = read_text(options.calibration).content
        texts.write_text(json.dumps([text[at : at + 4000] for at in range(0, len(text) - 4000, 4000)]))
        goal = {"average_bits": options.average[0], "bits": list(BITS), "groups": [options.group]}
        case = open_case(options.model, {"name": "gptq", "budget": goal}, work / "case", **bench.calibration)
        table = table_of(case)
        assert case.recipe.budget is not None
        layers = [row.layer for row in table.rows if len(row.options) > 1 and row.kind not in ENDS]
        for average in options.average:
            found = theirs(options, texts, average, case, table.about["sequences"])
            scores, nbytes, _ = bench.made(recipe_of(found["bits"], options.group, layers))
            taken = stored(found["bits"], options.group, case)
            rows.append({"chosen by": "AutoScheme", "average": average, "bits": taken, "bytes": nbytes,
                         "look_seconds": found["seconds"], **scores})  # fmt: skip
            print(rows[-1], flush=True)
            shutil.rmtree(work / "made")
            budget = case.recipe.budget.model_copy(update={"average_bits": taken})
            decision = decide(table, case.recipe.model_copy(update={"budget": budget}))
            scores, nbytes, _ = bench.made(decision.recipe)
            spent = table.about["processor_seconds"]
            rows.append({"chosen by": "hfquant", "average": average, "bits": decision.bits, "bytes": nbytes,
                         "look_seconds": spent, "predicted": decision.loss, **scores})  # fmt: skip
            print(rows[-1], flush=True)
            write(options.out, {"settings": told, "rows": rows})


if __name__ == "__main__":
    main()
