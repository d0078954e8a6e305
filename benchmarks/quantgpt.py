"""QuantGPT on small models of GPT-2's and BART's kind, trained here on the packaged text until it stops helping.

    python benchmarks/quantgpt.py --work FOLDER --out RESULT [--family gpt2] [--epochs 4] [--seeds 3]

The table: perplexity on the last tenth of the text, which no training saw, at weights-embeddings-inputs of 8-8-8,
4-4-8 and 2-2-8; at 2 bit also with the other quantizers, with what hfquant does besides the paper, and without one of
the two losses, over seeds.  Every checkpoint is written, loaded again and measured.  What is done is kept in FOLDER: a
run that was interrupted goes on where it was.  BART writes the second half of each window from the first.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from reporting import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hfquant
from hfquant.machine import hardware, versions
from hfquant.model.texts import packaged
from hfquant.train import plan, train
from hfquant.train.data import IGNORED, Sequences, arguments, collate, sequences
from hfquant.train.run import prepare

WINDOW, BATCH = 128, 32
CONFIGS: dict[str, Any] = {
    "gpt2": lambda v, d: transformers.GPT2Config(
        vocab_size=v, n_embd=d, n_layer=4, n_head=4, n_positions=WINDOW, resid_pdrop=0.1, embd_pdrop=0.1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "bart": lambda v, d: transformers.BartConfig(
        vocab_size=v, d_model=d, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=4 * d, decoder_ffn_dim=4 * d, max_position_embeddings=WINDOW,
        dropout=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
    ),
}  # fmt: skip
# name -> grid, and changes to the options
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "8-8-8": ("w8", {}),
    "4-4-8": ("w4", {}),
    "2-2-8": ("w2", {}),
    "2-2-8 pact": ("w2", {"quantizer": "pact"}),
    "2-2-8 lsq": ("w2", {"quantizer": "lsq"}),
    "2-2-8 laq": ("w2", {"quantizer": "laq"}),
    "2-2-8 per row": ("w2", {"per": "group"}),
    "2-2-8 start: paper": ("w2", {"start": "paper"}),
    "2-2-8 without contrast": ("w2", {"contrast": 0}),
}
ABLATED = ("2-2-8", "2-2-8 without contrast", "2-2-8 lsq")  # over all seeds


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(CONFIGS))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--teacher-epochs", type=int, default=20, help="at most")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scale-lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="to learn from and to measure on, else the packaged one")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def texts(work: Path, text: Path | None) -> tuple[Path, Path]:
    """What is learned from, and what is measured on."""
    whole = packaged("calibration") if text is None else text.read_text("utf-8")
    cut = whole.rindex("\n", 0, len(whole) * 9 // 10)
    (work / "train.txt").write_text(whole[:cut])
    (work / "held.txt").write_text(whole[cut:])
    return work / "train.txt", work / "held.txt"


def tokenizer_of(text: Path, size: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train([str(text)], trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def loss(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    logits, labels = model(**arguments(model, batch)).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def perplexity(model: PreTrainedModel, items: Sequences) -> float:
    model.eval()
    batches = [collate([items[i]], 0) for i in range(len(items))]
    return math.exp(sum(float(loss(model, batch)) for batch in batches) / len(batches))


def auto(family: str) -> Any:
    return transformers.AutoModelForSeq2SeqLM if family == "bart" else transformers.AutoModelForCausalLM


def teacher(family: str, args: argparse.Namespace, learn: Sequences, held: Sequences) -> PreTrainedModel:
    """Until held-out perplexity has not fallen for two epochs; its best epoch."""
    torch.manual_seed(0)
    config = CONFIGS[family](args.vocabulary, args.width)
    model = auto(family).from_config(config)
    steps = args.teacher_epochs * -(-len(learn) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    loader = torch.utils.data.DataLoader(learn, BATCH, shuffle=True, collate_fn=partial(collate, pad=0))
    best, kept, worse = math.inf, {}, 0
    for epoch in range(args.teacher_epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        now = perplexity(model, held)
        print(f"{family} teacher, epoch {epoch + 1}: {now:.3f}", flush=True)
        worse = 0 if now < best else worse + 1
        if now < best:
            best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}
        if worse == 2:
            break
    model.load_state_dict(kept)
    return model


def row(name: str, seed: int, source: Path, text: Path, held: Sequences, args: argparse.Namespace) -> dict[str, Any]:
    grid, changed = ROWS[name]
    settings = {"epochs": args.epochs, "batch": BATCH, "seq_len": WINDOW, "lr": args.lr, "scale_lr": args.scale_lr}
    step = {"method": "quantgpt", "seed": seed, **settings, **changed}
    out, begun = args.work / "checkpoint", time.process_time()
    shutil.rmtree(out, ignore_errors=True)
    todo = plan(source, {"steps": [step], "grid": grid}, str(text), out)
    rounded = type(todo.skeleton.model).from_pretrained(source, dtype=torch.float32)
    prepare(rounded, todo)
    report = train(todo)
    assert report is not None
    return {
        "family": source.name,
        "row": name,
        "seed": seed,
        "before_training": perplexity(rounded, held),
        "perplexity": perplexity(hfquant.load(out, dtype=torch.float32), held),
        "kB": report["output"]["bytes"] // 1000,
        "steps": report["compression"]["training"]["steps"],
        "processor_seconds": round(time.process_time() - begun, 1),
    }


def wanted(seeds: int) -> Iterator[tuple[str, int]]:
    yield from ((name, 0) for name in ROWS)
    yield from ((name, seed) for seed in range(1, seeds) for name in ABLATED)


def main() -> None:
    args = options()
    args.work.mkdir(parents=True, exist_ok=True)
    text, held_text = texts(args.work, args.text)
    tokenizer = tokenizer_of(text, args.vocabulary)
    rows: list[dict[str, Any]] = []
    teachers: dict[str, dict[str, Any]] = {}
    for family in args.family or list(CONFIGS):
        pairs, source = family == "bart", args.work / family
        learn, held = (sequences(str(t), tokenizer, seq_len=WINDOW, pairs=pairs) for t in (text, held_text))
        if not (source / "tokenizer.json").is_file():
            teacher(family, args, learn, held).save_pretrained(source)
            tokenizer.save_pretrained(source)
        original = auto(family).from_pretrained(source, dtype=torch.float32)
        teachers[family] = {"perplexity": perplexity(original, held), "parameters": original.num_parameters()}
        for name, seed in wanted(args.seeds):
            kept = args.work / f"{family}-{name.replace(' ', '_').replace(':', '')}-{seed}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(row(name, seed, source, text, held, args)))
            rows.append(json.loads(kept.read_text()))
            rows[-1]["ratio"] = round(rows[-1]["perplexity"] / teachers[family]["perplexity"], 4)
            print(rows[-1], flush=True)
            settings = {
                "text": f"{args.text.name if args.text else 'packaged calibration text'}: nine tenths to learn from,"
                " the last tenth to measure on",
                **{k: v for k, v in vars(args).items() if k not in ("work", "out", "family", "text")},
                "window": WINDOW, "batch": BATCH, "threads": torch.get_num_threads(),
                "hardware": hardware(), "versions": versions(),
            }  # fmt: skip
            write(args.out, {"settings": settings, "teachers": teachers, "rows": rows})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
