"""Token files for models that came without a tokenizer, from their vocabulary and their kind of text.

    python benchmarks/tokens.py VOCABULARY.json SENTENCES --out NAME

VOCABULARY: a list of tokens, or token -> number.  SENTENCES: lines, JSON lists of tokens or text that is cut into the
longest tokens there are.  Whole sentences are joined: the first 60 % become NAME_calibration.npy, the rest
NAME_test.npy.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    known = json.loads(args.vocabulary.read_text())
    number = known if isinstance(known, dict) else {token: i for i, token in enumerate(known)}
    sentences = [[number[token] for token in cut(line, number)] for line in args.sentences.read_text().splitlines()]
    calibration = int(0.6 * len(sentences))
    for name, some in (("calibration", sentences[:calibration]), ("test", sentences[calibration:])):
        joined = np.array([token for sentence in some for token in sentence], dtype=np.int64)
        np.save(f"{args.out}_{name}.npy", joined)
        print(f"{args.out}_{name}.npy: {len(joined):,} tokens of {len(some):,} sentences")


def cut(line: str, number: dict[str, int]) -> list[str]:
    """A sentence's tokens, with its end."""
    if line.startswith("["):
        return json.loads(line)
    longest = sorted((re.escape(token) for token in number), key=len, reverse=True)
    found = re.findall("|".join(longest), line)
    if "".join(found) != line:
        raise SystemExit(f"`{line}` has something that the vocabulary lacks")
    return [*found, "<eos>"]


if __name__ == "__main__":
    main()
