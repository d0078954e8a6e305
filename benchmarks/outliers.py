"""The same model with outliers: a few channels of what its layers read are many times larger, its output is unchanged.

    python benchmarks/outliers.py MODEL OUT [--channels 4] [--factor 50]

Large language models grow such channels by themselves, from about 6.7 billion parameters on; smaller ones, which fit
into a test, do not.  Here the weights (and biases) of the norms are multiplied, and the columns of the layers that
read them divided: an exact rewrite, proven on every block as SmoothQuant's are, whose inverse it is.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from hfquant.compress.resident import Resident
from hfquant.compress.streaming import Passage, Streamer
from hfquant.compress.view import float32_call
from hfquant.model.calibration import token_batches
from hfquant.model.fold import Folder
from hfquant.model.inputs import model_inputs
from hfquant.model.sites import Norm
from hfquant.model.trace import tensors


@torch.no_grad()
def plant(model: nn.Module, tokens: Tensor, channels: int, factor: float, seed: int = 0) -> int:
    """Give every norm that can take them outliers, in place; returns at how many places.

    tokens int64 [n, seq] show how the blocks are run.  The channels are the same everywhere, as they are in trained
    models.  The model's parameters must be float32.
    """
    places = 0
    with tempfile.TemporaryDirectory(prefix="outliers-") as folder:
        streamer = Streamer(Resident(model, torch.float32), tokens, Path(folder), len(tokens))  # type: ignore[arg-type]
        for passage in streamer.passages():
            for i, name in enumerate(passage.stack.blocks):
                block = model.get_submodule(name)
                places += _plant(block, passage, i, channels, factor, seed)
                passage.stream = passage.run(block, i, Path(folder) / f"{passage.stack.name}.{i + 1}")
    return places


def _plant(block: nn.Module, passage: Passage, index: int, channels: int, factor: float, seed: int) -> int:
    def run() -> tuple[object, list[Tensor]]:
        args, kwargs = float32_call(passage.arguments(index, 0), torch.device("cpu"))
        return block(*args, **kwargs), list(tensors((args, kwargs)))

    folder, places = Folder(block, run, torch.float32), 0
    for site in list(folder.sites()):
        if isinstance(site.maker, Norm):
            s = torch.ones(site.members[0].shape(block)[1])
            s[torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))[:channels]] = 1 / factor
            places += folder.scale(site, s) is not None
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0, help="chooses the channels")
    args = parser.parse_args()
    config = transformers.AutoConfig.from_pretrained(args.model)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tokens = token_batches("default", tokenizer, samples=2, seq_len=128, seed=0)
    with torch.no_grad():
        before = model(**model_inputs(config, tokens)).logits
        places = plant(model, tokens, args.channels, args.factor, args.seed)
        after = model(**model_inputs(config, tokens)).logits
    model.save_pretrained(args.out)  # float32: in 16 bit the rewrite would not be exact
    tokenizer.save_pretrained(args.out)
    apart = float((after - before).norm() / before.norm())
    print(json.dumps({"places": places, "channels": args.channels, "factor": args.factor, "logits_apart": apart}))


if __name__ == "__main__":
    main()
