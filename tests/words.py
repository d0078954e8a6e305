"""The tests' tokenizer of bytes, made into one that llama.cpp knows."""

import json
from pathlib import Path

MERGES = (("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("Ġ", "a"), ("i", "n"))
UNUSED = range(0xFF, 0xF4, -1)  # bytes that UTF-8 never has, and which stand for themselves in a vocabulary of bytes


def cut_words(folder: Path) -> None:
    """Have it cut words as GPT-2's does, and make a few merges, without which llama.cpp reads no vocabulary.

    What is merged takes the place of bytes that no text has: the vocabulary stays as large as it was.
    """
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    for pair, byte in zip(MERGES, UNUSED, strict=False):
        vocabulary["".join(pair)] = vocabulary.pop(chr(byte))
    found["model"]["merges"] = [list(pair) for pair in MERGES]
    found["pre_tokenizer"]["use_regex"] = True
    path.write_text(json.dumps(found))
