"""Exports to GGUF: the same weights, in types that other programs know."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from hfquant import dequantize, load
from hfquant.compress import compress
from hfquant.conversion.export import export
from hfquant.conversion.gguf import tokens
from hfquant.conversion.gguf.blocks import TYPES, exact, pack, runs
from hfquant.errors import ExportError
from hfquant.recipe import Recipe
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests import families
from tests.words import cut_words

IDS = torch.arange(4, 36)[None]
Built = Callable[[str], Path]
Kind = gguf.GGMLQuantizationType


def quantized(grid: Grid, dtype: torch.dtype = torch.float16, columns: int = 512) -> Quantized:
    W = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    scale, zero = grid.fit(W, dtype=dtype)
    return Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, 256, -1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_grid_is_stored_exactly_or_refused(bits: int, group: int, symmetric: bool) -> None:
    Q = quantized(Grid(bits, group, symmetric))
    if bits == 8 and not symmetric:
        with pytest.raises(ExportError, match="has no type for it: its codes reach from -") as refused:
            pack(Q, "it")
        assert "symmetric" in str(refused.value.hint)
        return
    kind, packed = pack(Q, "it")
    assert exact(kind, packed, Q)
    assert packed.shape == (6, 512 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_decoded_by_the_library_to_what_was_meant(kind: Kind) -> None:
    fits, make = TYPES[kind]
    tried = 0
    for bits, symmetric in ((1, True), (2, True), (2, False), (3, True), (4, False), (5, False), (5, True), (6, True)):
        Q = quantized(Grid(bits, 256, symmetric))
        Q.scale.copy_(Q.scale.abs().log2().round().exp2())  # so that offsets are exact in every type
        found = runs(Q, "it")
        if fits(found):
            tried += 1
            assert exact(kind, make(found).reshape(6, -1), Q), (bits, symmetric)
    assert tried


@pytest.mark.parametrize(
    ("name", "kind"),
    [("w4g32sym", "Q4_0"), ("w4g64sym", "Q4_0"), ("w8g32sym", "Q8_0"), ("w5g32sym", "Q5_0"), ("w4g256", "Q4_K"),
     ("w2g256", "Q2_K"), ("w3sym", "Q3_K"), ("w6sym", "Q6_K"), ("w5g256", "Q5_K"), ("w3g32", "Q4_0")],
)  # fmt: skip
def test_the_smallest_type_is_taken(name: str, kind: str) -> None:
    from hfquant.tensors.encoding import Encoding

    assert pack(quantized(Encoding.parse(name).grid), "it")[0].name == kind


def test_offsets_are_not_rounded() -> None:
    """Q4_1 stores −scale · zero in half precision: taken where that is exact, else a type with no offset."""
    Q = quantized(Grid(4, 32, False))
    assert pack(Q, "it")[0] == Kind.Q5_0
    Q.scale.copy_(Q.scale.log2().round().exp2())
    assert pack(Q, "it")[0] == Kind.Q4_1


@pytest.mark.parametrize(
    ("grid", "columns", "problem"),
    [(Grid(4, 48, True), 480, "share a scale between 32 columns, not 48"), (Grid(4, 16, True), 64, "not 16"),
     (Grid(4, -1, True), 100, "100 columns, no multiple of 32")],
)  # fmt: skip
def test_groups_that_no_type_has_are_refused(grid: Grid, columns: int, problem: str) -> None:
    with pytest.raises(ExportError, match=problem):
        pack(quantized(grid, columns=columns), "it")


def test_scales_that_would_be_rounded_are_refused() -> None:
    Q = quantized(Grid(4, 32, True), torch.bfloat16)
    Q.scale[0, 0] = 1e-12
    with pytest.raises(ExportError, match="scales in float16"):
        pack(Q, "it")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize(
    ("family", "recipe", "kinds"),
    [
        ("llama", "rtn-w4g32sym", {"Q4_0"}),
        ("llama-tied", "rtn-w8g32sym", {"Q8_0"}),
        ("qwen2", "rtn-w5g32sym", {"Q5_0"}),
        ("gpt2", "rtn-w4g32asym", {"Q5_0"}),
        ("llama", "sparsegpt-50+rtn-w3g32", {"Q4_0"}),
    ],
)
def test_another_reader_finds_the_same_model(
    family: str, recipe: str, kinds: set[str], built: Built, tmp_path: Path
) -> None:
    chosen = Recipe.parse(recipe, ["calibration.samples=4", "calibration.seq_len=32", "dtype=float16"])
    for _ in compress(built(family), chosen, tmp_path / "small"):
        pass
    cut_words(tmp_path / "small")
    done = export(tmp_path / "small", "gguf", tmp_path / "out")
    assert set(done["wire"]["types"].values()) == kinds
    assert len(done["wire"]["types"]) == len(families.linears(family))
    assert done["output"]["bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        gguf_file="model.gguf",
        dtype=torch.float32,
        config=AutoConfig.from_pretrained(tmp_path / "out"),
    )  # with its config: of GPT-2's positions the reader knows no other number than 1024
    ours = dequantize(load(tmp_path / "small", dtype=torch.float32))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli -m model.gguf" in card
    assert "library_name: gguf" in card
    assert "hfquant.load" not in card


def test_what_the_file_says_of_itself(built: Built, tmp_path: Path) -> None:
    for _ in compress(built("llama"), "rtn-w4g32sym", tmp_path / "small"):
        pass
    cut_words(tmp_path / "small")
    export(tmp_path / "small", "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.architecture"], said["llama.attention.head_count_kv"]) == ("llama", 2)
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert len(said["tokenizer.ggml.tokens"]) == families.VOCABULARY
    assert said["tokenizer.ggml.bos_token_id"] == 1
    assert said["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 3], "special tokens"


@pytest.mark.parametrize(
    ("family", "recipe", "problem"),
    [
        ("opt", "rtn-w4g32sym", "no export of `opt` models to gguf yet"),
        ("llama", "rtn-w8a8", "inputs that are rounded or divided"),
        ("llama", "rtn-w3g32+lorc-r4", "no room for a low-rank correction"),
        ("llama", "rtn-w8g32asym", "no type for"),
    ],
)
def test_what_cannot_be_said_is_refused(family: str, recipe: str, problem: str, built: Built, tmp_path: Path) -> None:
    chosen = Recipe.parse(recipe, ["calibration.samples=4", "calibration.seq_len=32"])
    for _ in compress(built(family), chosen, tmp_path / "small"):
        pass
    cut_words(tmp_path / "small")
    with pytest.raises(ExportError, match=problem) as refused:
        export(tmp_path / "small", "gguf", tmp_path / "out")
    assert refused.value.hint
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


class Tokenizer:
    """A tokenizer, as far as an export asks."""

    bos_token_id, eos_token_id, unk_token_id, pad_token_id, chat_template = 1, 2, 0, None, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 5]}


def added(tmp_path: Path, found: dict[str, Any], rows: int = 8) -> dict[str, Any]:
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    tokenizer: PreTrainedTokenizerBase = Tokenizer()  # type: ignore[assignment]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    tokens.add(writer, tmp_path, tokenizer, rows)
    return {name: value.value for name, value in writer.kv_data[0].items()}


PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "▁the": 4, "a": 5}
SPECIAL = [{"id": i, "special": True, "content": list(PIECES)[i]} for i in range(3)]


def test_sentencepiece(tmp_path: Path) -> None:
    found = {
        "model": {"type": "BPE", "vocab": PIECES, "merges": [], "byte_fallback": True},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
        "pre_tokenizer": None,
        "added_tokens": SPECIAL,
    }
    said = added(tmp_path, found)
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.tokens"] == [*PIECES, "[PAD6]", "[PAD7]"]
    assert said["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 1, 1, 5, 5]
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_space_prefix"] is True
    assert said["tokenizer.ggml.scores"][:3] == [0, -1, -2], "the earlier a merge, the sooner it is made"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": {"type": "Unigram", "vocab": PIECES}}, "of type Unigram"),
        ({"model": {"type": "BPE", "vocab": PIECES, "merges": []}}, "has no merges"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "how this tokenizer cuts text"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}},
                                                                 {"type": "ByteLevel", "use_regex": False}]}},
         "how this tokenizer cuts text"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    found = {
        "model": {"type": "BPE", "vocab": PIECES, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "added_tokens": SPECIAL,
    }
    assert added(tmp_path, found)["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(ExportError, match=problem):
        added(tmp_path, found | change)
    with pytest.raises(ExportError, match="the model only 3"):
        added(tmp_path, found, rows=3)


def test_a_folder_without_a_tokenizer_is_refused(built: Built, tmp_path: Path) -> None:
    for _ in compress(built("llama"), "rtn-w4g32sym", tmp_path / "small"):
        pass
    shutil.copytree(tmp_path / "small", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match="tokenizer"):
        export(tmp_path / "bare", "gguf", tmp_path / "out")
