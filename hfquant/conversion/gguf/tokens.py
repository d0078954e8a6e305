"""A tokenizer as a GGUF file tells of it.

llama.cpp has the two kinds of byte-pair encoding: over bytes, as GPT-2 began it, where a name stands for the rule that
cuts text into words; and SentencePiece's, where merges have scores.  A rule that has no name here is refused: with
another one the model would read other tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...errors import ExportError

BYTES = "ByteLevel"
# how tokenizer.json cuts words -> llama.cpp's name for it.  The regular expressions are those of the model families.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
HINT = "use `--to dense` and llama.cpp's own converter, or give llama.cpp the original's vocabulary"


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ExportError where there is none."""
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"`{folder}` has no tokenizer.json, from which the vocabulary is taken", HINT)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def add(writer: gguf.GGUFWriter, folder: Path, tokenizer: Any, rows: int) -> None:
    """Write the vocabulary of a model whose embedding has `rows`.  Raises ExportError if it cannot be said."""
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    model = found["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"the export to gguf does not know tokenizers of type {model.get('type')}", HINT)
    tokens, kinds = _tokens(found, tokenizer, rows)
    if _is_sentencepiece(found):
        writer.add_tokenizer_model("llama")
        # a merge is made the sooner the lower its number: SentencePiece's own scores for byte-pair encoding
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_add_space_prefix(_adds_space(found))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(found))
        if not model["merges"]:
            raise ExportError("the tokenizer has no merges, and llama.cpp reads no such vocabulary", HINT)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(int(number))
    start = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(start) and start[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(found: Mapping[str, Any], tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """Every row's token, in order, and its kind; rows that no token has are named so."""
    listed = found.get("added_tokens") or ()
    named = {int(number): str(token) for token, number in found["model"]["vocab"].items()}
    named |= {int(token["id"]): str(token["content"]) for token in listed}
    if max(named) >= rows:
        raise ExportError(f"the tokenizer knows token {max(named)}, the model only {rows}", HINT)
    added = {int(token["id"]): bool(token["special"]) for token in listed}
    tokens, kinds = [], []
    for i in range(rows):
        token = named.get(i)
        if token is None:
            kind = TokenType.UNUSED
        elif i == getattr(tokenizer, "unk_token_id", None) and _is_sentencepiece(found):
            kind = TokenType.UNKNOWN
        elif i in added:
            kind = TokenType.CONTROL if added[i] else TokenType.USER_DEFINED
        elif _is_byte(token) and _is_sentencepiece(found):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(f"[PAD{i}]" if token is None else token)
        kinds.append(int(kind))
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _is_sentencepiece(found: Mapping[str, Any]) -> bool:
    return bool(found["model"].get("byte_fallback"))


def _parts(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    if not part:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _split(found: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule that cuts words, known by what the rule is."""
    steps = _parts(found.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == [BYTES] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", BYTES] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", BYTES] and not steps[1].get("use_regex", True):
        rule = (steps[0].get("pattern") or {}).get("Regex")
        if rule in SPLITS:
            return SPLITS[rule]
    raise ExportError("the export to gguf does not know how this tokenizer cuts text into words", HINT)


def _adds_space(found: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front, so that its first word is one as any other."""
    if any(step["type"] == "Prepend" for step in _parts(found.get("normalizer"), "normalizers")):
        return True
    meta = [s for s in _parts(found.get("pre_tokenizer"), "pretokenizers") if s["type"] == "Metaspace"]
    return bool(meta) and meta[0].get("prepend_scheme", "always") != "never"
