import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hfquant.errors import CheckpointError
from hfquant.measure.evaluate import compare, kl_divergence, logits, perplexity, score
from hfquant.measure.feed import Feed
from hfquant.model.inputs import longest
from hfquant.model.source import open_source
from hfquant.model.stream import stream_logits
from hfquant.runtime import kernels
from hfquant.runtime.nn import QLinear
from hfquant.runtime.swap import dequantize_
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid
from tests.runtime.rounding import rounded

from .models import nudged, save, tiny

IDS = torch.randint(0, 260, (5, 24), generator=torch.Generator().manual_seed(3))


def by_hand(model: PreTrainedModel, windows: Tensor) -> float:
    """The protocol spelled out in float64, one token at a time."""
    total = 0.0
    for window in windows:
        rows = model(input_ids=window[None]).logits[0].double()
        loss = 0.0
        for t in range(len(window) - 1):
            weights = [math.exp(v) for v in rows[t].tolist()]
            loss -= math.log(weights[window[t + 1]] / sum(weights))
        total += loss / (len(window) - 1) * len(window)
    return math.exp(total / windows.numel())


@torch.no_grad()
def test_perplexity_is_the_protocols() -> None:
    model = tiny()
    scores = perplexity(model, IDS)
    assert scores.perplexity == pytest.approx(by_hand(model, IDS), rel=1e-6)
    assert (scores.tokens, scores.windows, scores.window) == (5 * 23, 5, 24)
    assert (scores.kl, scores.top1_agreement, scores.reference_perplexity) == (None, None, None)
    assert scores.settings["dtype"] == "float32"
    assert scores.settings["device"] == "cpu"
    assert "causal" in scores.settings["feed"]


def test_long_windows_are_summed_in_pieces_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    whole = compare(logits(tiny(1), IDS), model, IDS)
    monkeypatch.setattr("hfquant.measure.evaluate.STRETCH", 7)
    pieces = compare(logits(tiny(1), IDS), model, IDS)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-9)
    assert pieces.top1_agreement == whole.top1_agreement


def test_the_error_of_growth_is_how_much_means_of_it_differ_between_texts() -> None:
    """Measured on many texts of one kind: the mean of the stated errors is the deviation of what was measured."""
    generator, uniform = torch.Generator().manual_seed(0), torch.full((1, 257, 2), 0.5).log()
    q = torch.tensor([0.3, 0.7]).log().expand(1, 257, 2)  # of a text of fair coins
    growths, errors = [], []
    for _ in range(200):
        ids = torch.randint(2, (4, 257), generator=generator)
        scores = score([uniform] * 4, [q] * 4, ids, Feed(tiny().config))
        assert scores.reference_perplexity is not None
        growths.append(math.log(scores.perplexity / scores.reference_perplexity))
        errors.append(scores.growth_error)
    by_hand = 0.5 * math.log(0.7 / 0.3) / math.sqrt(4 * 256)  # deviation of a token's loss, over the root of tokens
    assert statistics.mean(errors) == pytest.approx(by_hand, rel=0.05)
    assert statistics.stdev(growths) == pytest.approx(by_hand, rel=0.15)


def test_tokens_that_err_together_count_as_few() -> None:
    """All of a stretch good, or all bad: as many independent values as there are stretches."""
    ids = torch.arange(8)[:, None].remainder(2).expand(8, 129)
    uniform, q = torch.full((1, 129, 2), 0.5).log(), torch.tensor([0.3, 0.7]).log().expand(1, 129, 2)
    scores = score([uniform] * 8, [q] * 8, ids, Feed(tiny().config))
    assert scores.growth_error == pytest.approx(0.5 * math.log(0.7 / 0.3) / math.sqrt(7), rel=1e-5)


def test_few_stretches_of_text_say_nothing_of_others() -> None:
    assert compare(logits(tiny(), IDS[:7]), nudged(tiny(), 0.2), IDS[:7]).growth_error is None
    ids = IDS[:1].expand(8, -1)
    assert compare(logits(tiny(), ids), nudged(tiny(), 0.2), ids).growth_error == 0, "eight, all alike"


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    flat = [torch.zeros(1, 24, 260) for _ in IDS]
    assert score(None, flat, IDS, Feed(tiny().config)).perplexity == pytest.approx(260)


def test_a_model_against_itself() -> None:
    scores = compare(logits(tiny(), IDS), tiny(), IDS)
    assert scores.kl == 0
    assert scores.top1_agreement == 1
    assert scores.perplexity == scores.reference_perplexity


@torch.no_grad()
def test_kl_and_agreement_are_the_formulas() -> None:
    original, other = tiny(), nudged(tiny(), 0.2)
    scores = compare(logits(original, IDS), other, IDS)
    p = original(input_ids=IDS).logits[:, :-1].double().softmax(-1)
    q = other(input_ids=IDS).logits[:, :-1].double().softmax(-1)
    assert scores.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert scores.kl > 0.01
    assert scores.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < scores.top1_agreement < 1
    assert scores.reference_perplexity == pytest.approx(by_hand(original, IDS), rel=1e-6)


def test_what_the_original_rules_out_costs_nothing_and_what_only_the_other_rules_out_costs_all() -> None:
    even, first = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert float(kl_divergence(first, even)) == pytest.approx(math.log(2))
    assert float(kl_divergence(even, first)) == math.inf


def test_a_broken_model_is_seen() -> None:
    model = tiny()
    model.lm_head.weight.data[7, 3] = math.nan
    scores = compare(logits(tiny(), IDS), model, IDS)
    assert math.isnan(scores.perplexity)
    assert math.isnan(scores.kl)
    assert scores.reference_perplexity is not None
    assert math.isfinite(scores.reference_perplexity)


def test_only_one_window_of_logits_is_alive_at_a_time() -> None:
    asked: list[int] = []

    def reference():  # type: ignore[no-untyped-def]
        for i, found in enumerate(logits(tiny(), IDS)):
            asked.append(i)
            yield found

    class Counting(torch.nn.Module):
        config = tiny().config
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, input_ids: Tensor, **kwargs: object) -> object:
            assert len(input_ids) == 1
            assert asked[-1] == len(done), "the original is ahead by more than this window"
            done.append(1)
            return tiny()(input_ids=input_ids)

    done: list[int] = []
    compare(reference(), Counting(), IDS)  # type: ignore[arg-type]
    assert len(done) == len(IDS)


def test_models_of_different_vocabulary_are_refused() -> None:
    reference = (torch.zeros(1, 24, 300) for _ in IDS)
    with pytest.raises(CheckpointError, match=r"\[23, 300\].*\[23, 260\]"):
        compare(reference, tiny(), IDS)


def test_a_reference_with_too_few_windows_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(iter([torch.zeros(1, 24, 260)]), tiny(), IDS)


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
@torch.no_grad()
def test_encoder_decoders_score_every_token_as_their_own_loss_does(family: str, built: Callable[[str], Path]) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(built(family)) if family != "whisper" else _whisper(built)
    windows = IDS.clamp(4)  # no padding, which the model's own loss leaves out
    inputs = Feed(model.config).inputs(windows)
    inputs.pop("decoder_input_ids")
    own = model(**inputs, labels=windows).loss
    scores = compare(logits(model, windows), model, windows)
    assert scores.perplexity == pytest.approx(float(own.exp()), rel=1e-4)
    assert scores.tokens == windows.numel()
    assert scores.kl == 0


def _whisper(built: Callable[[str], Path]) -> PreTrainedModel:
    from transformers import WhisperForConditionalGeneration

    model: PreTrainedModel = WhisperForConditionalGeneration.from_pretrained(built("whisper"))
    return model


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bart"])
def test_a_streamed_original_scores_as_a_loaded_one(family: str, built: Callable[[str], Path]) -> None:
    auto = AutoModelForSeq2SeqLM if family == "bart" else AutoModelForCausalLM
    model = auto.from_pretrained(built(family))
    streamed = stream_logits(open_source(built(family)), IDS, dtype=torch.float32)
    scores = compare(streamed, model, IDS)
    assert scores.reference_perplexity == pytest.approx(scores.perplexity, rel=1e-5)
    assert scores.kl is not None
    assert scores.kl < 1e-6


def test_bfloat16_models_are_scored_in_float32(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save(tiny(), tmp_path), dtype=torch.bfloat16)
    rows = [x.float() for x in logits(model, IDS)]
    expected = score(None, rows, IDS, Feed(model.config)).perplexity
    assert perplexity(model, IDS).perplexity == pytest.approx(expected, rel=1e-9)
    assert perplexity(model, IDS).settings["dtype"] == "bfloat16"


def test_longest_window() -> None:
    assert longest(tiny().config) == 64


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs a kernel that rounds")
def test_scores_are_those_of_the_weights_not_of_the_kernels() -> None:
    """Whatever may run elsewhere, a compressed model is scored as its decoded twin is; `mode` says otherwise."""
    model = tiny()
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = QLinear.from_quantized(
                rounded(linear.weight, Grid(4, 16)), None, formats.load("native"), torch.float32
            )
            model.model.layers.set_submodule(name, packed)
    twin = copy.deepcopy(model)
    dequantize_(twin, torch.float32)
    expected = perplexity(twin, IDS).perplexity
    with kernels.mode("auto"):
        scores = perplexity(model, IDS)
        assert scores.perplexity == pytest.approx(expected, rel=1e-6)
        assert scores.settings["kernels"] == "exact"
    rough = compare(None, model, IDS, mode="auto")
    assert rough.settings["kernels"] == "auto"
    assert rough.perplexity == pytest.approx(expected, rel=0.2)
    assert rough.perplexity != pytest.approx(expected, rel=1e-6)
