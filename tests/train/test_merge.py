"""An adapter is added to packed weights, rounded again, and what that cost is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hfquant
from hfquant.cli import app
from hfquant.compress import compress
from hfquant.errors import HfquantError
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import LowRank, Quantized
from hfquant.train.adapter import merge
from hfquant.train.merge import outcome, requantize
from tests import families

peft = pytest.importorskip("peft")


def quantized(bits: int = 4, symmetric: bool = True) -> Quantized:
    W = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits, 16, symmetric)
    scale, zero = grid.fit(W, search=10)
    return Quantized(codes=grid.encode(W, scale, zero), scale=scale, zero_point=zero, grid=grid)


def delta(size: float) -> torch.Tensor:
    return size * torch.randn(12, 40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_added_changes_nothing(symmetric: bool) -> None:
    Q = quantized(3, symmetric)
    again = requantize(Q, torch.zeros(12, 40))
    assert torch.equal(again.codes, Q.codes)
    assert torch.equal(again.scale, Q.scale)


def test_scales_follow_a_large_adapter_and_stay_for_a_small_one() -> None:
    Q = quantized()
    W = Q.dequantize() + delta(1.0)
    old = Q.grid.decode(Q.grid.encode(W, Q.scale, Q.zero_point), Q.scale, Q.zero_point)
    assert (requantize(Q, delta(1.0)).dequantize() - W).norm() < 0.8 * (old - W).norm()
    small = requantize(Q, delta(1e-4))
    assert (small.scale == Q.scale).float().mean() > 0.9
    assert torch.equal(small.codes, Q.codes), "which is why so small an adapter is lost"
    assert outcome("x", Q.dequantize(), delta(1e-4), small.dequantize()).kept == pytest.approx(0, abs=0.05)


def test_what_a_layer_has_besides_stays() -> None:
    low_rank = LowRank(
        u=torch.ones(12, 2, dtype=torch.int8), v=torch.ones(2, 40, dtype=torch.int8), scale=torch.full((2,), 0.1)
    )
    mask = torch.rand(12, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    Q = Quantized(
        **{**vars(quantized(8)), "low_rank": low_rank, "input_scale": torch.linspace(0.5, 2, 40), "mask": mask}
    )
    merged = requantize(Q, delta(0.2) * mask)
    assert torch.equal(merged.mask, mask)
    assert merged.encoding == Q.encoding
    wanted = Q.dequantize() + delta(0.2) * mask
    assert float((merged.dequantize() - wanted).norm() / wanted.norm()) < 0.02


def test_outcome_measures_against_the_adapter() -> None:
    before, added = torch.eye(4), 0.5 * torch.eye(4)
    assert outcome("x", before, added, before + added) == outcome("x", before, added, 1.5 * before)
    exact, lost = outcome("x", before, added, before + added), outcome("x", before, added, before)
    assert (exact.error, exact.adapter_error, exact.kept) == (0, 0, 1)
    assert (lost.adapter_error, lost.kept) == (1, 0)
    assert lost.error == pytest.approx(1 / 3)


CASES = {
    "w8 native": ("llama", {"grid": "w8", "format": "native"}),
    "w4g32 compressed_tensors": ("llama", {"grid": "w4g32sym", "format": "compressed_tensors"}),
    "w3g32 gptq": ("llama", {"grid": "w3g32asym", "format": "gptq"}),
    "w6g48 native, Conv1D": ("gpt2", {"grid": "w6g48asym", "format": "native"}),
}


def adapted(model: Any, **settings: Any) -> Any:
    """With an adapter that changes what it predicts: as large as a tenth of the weights."""
    torch.manual_seed(0)
    chosen = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    made = peft.get_peft_model(model, peft.LoraConfig(**(chosen | settings))).eval()
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2.0)
    return made


@pytest.fixture
def compressed(built: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, **more: Any) -> Path:
        list(compress(built(family), {"steps": [{"method": "rtn"}], "dtype": "keep", **more}, tmp_path / "small"))
        return tmp_path / "small"

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_merged_checkpoint_is_the_adapted_model_rounded(
    case: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    family, more = CASES[case]
    folder, ids = compressed(family, **more), families.held_out(4)
    model = hfquant.load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        first = model(ids).logits
        whole = adapted(model)
        wanted = whole(ids).logits
        whole.save_pretrained(tmp_path / "adapter")
        done = merge(folder, tmp_path / "adapter", tmp_path / "merged", windows=2)
        found = hfquant.load(tmp_path / "merged", dtype=torch.float32).eval()(ids).logits
    bits = int(case[1])
    lost, moved = float((found - wanted).norm()), float((first - wanted).norm())
    assert lost < {8: 0.1, 6: 0.3, 4: 0.8, 3: 1.1}[bits] * moved
    rows = done["adapter"]["layers"]
    assert len(rows) == len([n for n in families.linears(family)])
    assert all(0 < row["error"] < 0.5 and row["kept"] > 0.5 for row in rows)
    before, after = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "merged")
    )
    assert before == after
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert done["adapter"]["against_unmerged"]["kl"] >= 0
    assert all(row["error"] is None for row in done["layers"])


def test_more_bits_keep_more_of_it(compressed: Callable[..., Path], tmp_path: Path) -> None:
    errors = []
    for bits in (3, 5, 8):
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        folder = compressed("llama", grid=f"w{bits}g32sym", format="native")
        adapted(hfquant.load(folder, dtype=torch.float32)).save_pretrained(tmp_path / "adapter")
        errors.append(merge(folder, tmp_path / "adapter", tmp_path / f"m{bits}", windows=1)["adapter"]["mean"])
    assert errors[0]["adapter_error"] > 2 * errors[1]["adapter_error"] > 4 * errors[2]["adapter_error"]
    assert errors[2]["kept"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
        (None, "adapter_config.json"),
    ],
)
def test_other_adapters_are_refused(
    settings: dict[str, Any] | None, said: str, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = compressed("llama", grid="w4g32sym")
    (tmp_path / "adapter").mkdir()
    if settings is not None:
        config = {"peft_type": "LORA", "bias": "none", **settings}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "adapter"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`", "ignore:Found missing"
)
def test_what_does_not_fit_is_refused(compressed: Callable[..., Path], tmp_path: Path) -> None:
    """Another model's adapter; a head that shares its weight; a folder that is in use."""
    folder = compressed("gpt2", grid="w8", embeddings="w8", format="native")
    model = hfquant.load(folder, dtype=torch.float32)
    adapted(model, target_modules=["lm_head"]).save_pretrained(tmp_path / "head")
    with pytest.raises(HfquantError, match="shares its weight"):
        merge(folder, tmp_path / "head", tmp_path / "out")
    other = families.random_model("llama")
    adapted(other, target_modules=["q_proj"]).save_pretrained(tmp_path / "llama")
    with pytest.raises(HfquantError, match="does not fit"):
        merge(folder, tmp_path / "llama", tmp_path / "out")
    deeper = families.random_model("gpt_neo")  # has layers of the same names, and others
    adapted(deeper, target_modules=["c_proj"]).save_pretrained(tmp_path / "deeper")
    with pytest.raises(HfquantError, match="does not fit"):
        merge(folder, tmp_path / "deeper", tmp_path / "out")
    with pytest.raises(HfquantError, match="not empty"):
        merge(folder, tmp_path / "head", folder)
    assert not (tmp_path / "out").exists()
