import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hfquant
from hfquant import report
from hfquant.errors import CalibrationError, CheckpointError, QualityError, SourceError
from hfquant.measure.verify import _words, verify
from tests.families import byte_tokenizer

from .models import WORDS, nudged, save, tiny

SHORT: dict[str, Any] = {"windows": 3, "window_len": 24, "new_tokens": 4}


def dense(folder: Path, dtype: Any) -> PreTrainedModel:
    """Stands for `hfquant.load` where the folder is not really compressed."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(WORDS * 4)
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = save(tiny(), tmp_path / "original")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Something like a compressed checkpoint of `original`."""
    return save(nudged(tiny(), 0.1), tmp_path / "small")


@pytest.mark.parametrize(("products", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_scores_are_not_taken_in_a_type_that_the_processor_multiplies_slowly(
    products: bool, dtype: str, small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save(tiny().to(torch.bfloat16), tmp_path / "half")
    monkeypatch.setattr("hfquant.measure.verify.multiplies_bfloat16", lambda: products)
    loads = []

    def loader(folder: Path, dtype: Any) -> PreTrainedModel:
        loads.append(dtype)
        return dense(original, dtype)

    done = verify(small, against=original, text=text, loader=loader, **SHORT)
    assert done["evaluation"]["settings"]["dtype"] == dtype
    assert loads == ["auto"] + [torch.float32] * (not products)
    assert done["evaluation"]["kl"] == pytest.approx(0, abs=1e-6)


def test_everything_is_measured_and_written(original: Path, small: Path, text: Path) -> None:
    report.merge(small, compression={"seconds": 3.5, "peak_memory_bytes": 10**8}, output={"more": 1})
    done = verify(small, against=original, text=text, loader=dense, **SHORT)
    assert json.loads((small / "report.json").read_text()) == done
    found = done["evaluation"]
    assert found["perplexity"] != found["reference_perplexity"]
    assert found["kl"] > 1e-4
    assert 0 < found["top1_agreement"] <= 1
    assert (found["tokens"], found["windows"], found["window"]) == (3 * 23, 3, 24)
    assert found["settings"]["text"] == "fox.txt"
    assert len(found["settings"]["sha256"]) == 64
    assert found["settings"]["dtype"] == "float32"
    assert found["tokens_per_second"] > 0
    assert found["reference_tokens_per_second"] > 0
    assert found["scan"]["tensors"] == len(load_file(small / "model.safetensors"))
    assert found["peak_memory_bytes"] > 10**7
    assert found["seconds"] > 0
    assert found["versions"]["hfquant"] == hfquant.__version__
    assert found["hardware"]["cores"] >= 1
    assert done["sample"]["prompt"] == WORDS[:15] == "The quick brown"
    assert set(done["sample"]) == {"prompt", "original", "compressed"}
    assert done["output"]["bytes"] == (small / "model.safetensors").stat().st_size
    assert done["output"]["more"] == 1
    assert "report.json" not in done["output"]["files"]
    assert done["source"]["license"] == "mit"
    assert done["source"]["bytes"] == sum(p.numel() * 4 for p in tiny().parameters())
    assert done["compression"]["seconds"] == 3.5
    assert done["gate"] == {"passed": True, "limits": done["gate"]["limits"], "broken": []}
    card = (small / "README.md").read_text("utf-8")
    assert f"{found['perplexity']:.4g}" in card
    assert str(original.parent) not in card


def test_the_scores_are_those_of_the_two_models(original: Path, small: Path, text: Path) -> None:
    found = verify(small, against=original, text=text, loader=dense, **SHORT)["evaluation"]
    swapped = verify(original, against=small, text=text, loader=dense, **SHORT)["evaluation"]
    assert found["perplexity"] == pytest.approx(swapped["reference_perplexity"], rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(swapped["perplexity"], rel=1e-5)
    assert found["top1_agreement"] == swapped["top1_agreement"]


def test_the_report_remembers_the_original(original: Path, small: Path, text: Path) -> None:
    report.merge(small, source={"id": str(original), "revision": None})
    assert verify(small, text=text, loader=dense, **SHORT)["evaluation"]["kl"] > 0


def test_without_an_original_the_model_is_scored_alone(small: Path, text: Path) -> None:
    done = verify(small, text=text, loader=dense, **SHORT)
    assert done["evaluation"]["perplexity"] > 1
    assert done["evaluation"]["kl"] is None
    assert done["sample"]["original"] is None
    assert "gate" not in done


@pytest.mark.parametrize(
    ("text", "kept"), [("a fox ju", "a fox"), ("a fox ", "a fox"), ("fo", "fo"), ("", ""), ("ab ab a", "ab ab")]
)
def test_default_prompts_end_with_a_whole_word(text: str, kept: str) -> None:
    assert _words(text) == kept


def test_a_prompt_may_be_given(original: Path, small: Path, text: Path) -> None:
    done = verify(small, against=original, text=text, prompt="The dog", loader=dense, **SHORT)
    assert done["sample"]["prompt"] == "The dog"


def test_windows_longer_than_the_model_are_shortened(small: Path, text: Path) -> None:
    done = verify(small, text=text, loader=dense, **SHORT | {"window_len": 512})
    assert done["evaluation"]["window"] == 64


def test_report_and_card_are_there_when_the_gate_fails(original: Path, tmp_path: Path, text: Path) -> None:
    bad = save(tiny(7), tmp_path / "bad")
    report.merge(bad, recipe={"name": "r", "gate": {"max_ppl_ratio": None, "max_kl": 0.5}})
    with pytest.raises(QualityError, match=r"KL divergence is .* at most 0\.5"):
        verify(bad, against=original, text=text, loader=dense, **SHORT)
    assert report.read(bad)["gate"]["passed"] is False
    assert "did not pass" in (bad / "README.md").read_text("utf-8")
    done = verify(bad, against=original, text=text, loader=dense, enforce=False, **SHORT)
    assert done["gate"]["passed"] is False


def test_a_model_that_computes_nan_does_not_pass(original: Path, tmp_path: Path, text: Path) -> None:
    huge = tiny()
    huge.lm_head.weight.data.fill_(3e38)
    bad = save(huge, tmp_path / "bad")
    with pytest.raises(QualityError, match="not a number"):
        verify(bad, against=original, text=text, loader=dense, **SHORT)
    assert report.read(bad)["evaluation"]["perplexity"] is None


def test_damage_is_found_before_anything_is_loaded(original: Path, small: Path, text: Path) -> None:
    tensors = load_file(small / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, small / "model.safetensors")

    def never(folder: Path, dtype: Any) -> PreTrainedModel:
        pytest.fail("loaded a damaged checkpoint")

    with pytest.raises(CheckpointError, match=r"`model\.norm\.weight` .* nan at element 3"):
        verify(small, against=original, text=text, loader=never, **SHORT)


def test_what_cannot_be_measured_is_refused(original: Path, small: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        verify(small, against=tmp_path / "nowhere", text=text, loader=dense, **SHORT)
    text.write_text("short")
    with pytest.raises(CalibrationError, match="fewer than one window"):
        verify(small, against=original, text=text, loader=dense, **SHORT)
    for file in (*small.glob("tokenizer*"), *small.glob("special*")):
        file.unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        verify(small, against=original, loader=dense, **SHORT)


def test_an_original_that_does_not_fit_is_streamed_but_does_not_speak(
    original: Path, small: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfquant.measure.original.available_memory", lambda: 1000)
    done = verify(small, against=original, text=text, loader=dense, **SHORT)
    assert done["sample"]["original"] is None
    assert done["evaluation"]["reference_perplexity"] > 1
    assert "Original:" not in (small / "README.md").read_text("utf-8")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bart"])
def test_packed_checkpoints_are_loaded_by_hfquant(family: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    auto = AutoModelForSeq2SeqLM if family == "bart" else AutoModelForCausalLM
    config = hfquant.HfQuantConfig("rtn-w4g32")
    model = auto.from_pretrained(built(family), quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    done = verify(tmp_path, against=built(family), **SHORT)
    assert done["evaluation"]["settings"]["text"] == "hfquant evaluation"
    assert done["evaluation"]["perplexity"] != done["evaluation"]["reference_perplexity"]
    assert done["evaluation"]["kl"] > 0
    assert done["output"]["bytes"] < done["source"]["bytes"]
    assert done["output"]["encoder_decoder"] is (family == "bart")
    assert done["wire"]["format"] == ("gptq" if family == "gpt2" else "compressed_tensors")
    assert ("without hfquant" in (tmp_path / "README.md").read_text("utf-8")) is (family != "bart")
