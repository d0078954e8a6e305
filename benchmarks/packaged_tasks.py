"""Choose the questions that come with hfquant: python packaged_tasks.py FOLDER

FOLDER holds arc_easy.jsonl and winogrande.jsonl as LLM Foundry has them, piqa_valid.jsonl with piqa_valid_labels.lst as
its authors do, and hellaswag_val.jsonl with `ctx`, `endings` and `gold`.  The files written
are those of `hfquant/measure/data`: the same input gives the same bytes.  Texts are in the form in which lm-eval puts
them into its prompts.
"""

import gzip
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hfquant.measure

QUESTIONS = 100
OUT = Path(hfquant.measure.__file__).parent / "data"
Row = dict[str, Any]
# HellaSwag's texts from wikiHow have its categories as labels, and wikiHow's own licence: not for commercial use.
WIKIHOW = re.compile(
    r"(Cars|Computers|Education|Family|Finance|Food|Health|Hobbies|Holidays|Home|Personal|Pets|Philosophy|"
    r"Relationships|Sports and|Travel|Work World|Youth)\b[^:]*:"
)
CAPTION = re.compile(r"(?P<label>[A-Z][^:]+): (?P<a>.+[.!?]) (?P<b>[a-z][^.!?\[]*)")


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def arc_easy(folder: Path) -> Iterator[Row]:
    for row in lines(folder / "arc_easy.jsonl"):
        yield {key: row[key] for key in ("query", "choices", "gold")}


def hellaswag(folder: Path) -> Iterator[Row]:
    """Captions of ActivityNet.  lm-eval begins the last, unfinished sentence with a capital letter."""
    rows = lines(folder / "hellaswag_val.jsonl")
    first = next(i for i, row in enumerate(rows) if WIKIHOW.match(row["ctx"]))
    for row in rows[:first]:
        found = CAPTION.fullmatch(row["ctx"])
        if found and not any("[" in ending or "  " in ending for ending in row["endings"]):
            text = f"{found['label']}: {found['a']} {found['b'].capitalize()}"
            yield {"ctx": text, "endings": [ending.strip() for ending in row["endings"]], "gold": row["gold"]}


def piqa(folder: Path) -> Iterator[Row]:
    answers = (folder / "piqa_valid_labels.lst").read_text().split()
    for row, gold in zip(lines(folder / "piqa_valid.jsonl"), answers, strict=True):
        yield {key: row[key] for key in ("goal", "sol1", "sol2")} | {"gold": int(gold)}


def winogrande(folder: Path) -> Iterator[Row]:
    for row in lines(folder / "winogrande.jsonl"):
        if row["continuation"] == row["continuation"].strip():
            yield {key: row[key] for key in ("context_options", "continuation", "gold")}


def write(choose: Callable[[Path], Iterator[Row]], folder: Path) -> Path:
    """QUESTIONS of them, drawn by chance, in their order."""
    rows = list(choose(folder))
    drawn = sorted(random.Random(0).sample(range(len(rows)), QUESTIONS))
    text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in drawn)
    path = OUT / f"{choose.__name__}.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{path.name}: {QUESTIONS} of {len(rows)} that fit, {path.stat().st_size} bytes")
    return path


if __name__ == "__main__":
    for task in (arc_easy, hellaswag, piqa, winogrande):
        write(task, Path(sys.argv[1]))
