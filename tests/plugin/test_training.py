"""Adapters on a compressed model, and what may be done with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hfquant
from hfquant.plugin import HfQuantConfig

from .models import IDS, load_with_transformers, logits, packed

peft = pytest.importorskip("peft")

GRIDS = {"compressed_tensors": "w4g32sym", "gptq": "w3g32asym", "native": "w5g48asym"}


@pytest.fixture(params=GRIDS)
def model(request: pytest.FixtureRequest, dense: Callable[[str], Path]) -> PreTrainedModel:
    recipe = {"steps": [{"method": "rtn", "search": 0}], "grid": GRIDS[request.param], "format": request.param}
    return load_with_transformers("llama", dense("llama"), quantization_config=HfQuantConfig(recipe))


@pytest.mark.parametrize("targets", [None, "all-linear", ["up_proj"]])
def test_lora_attaches_and_learns(targets: object, model: PreTrainedModel) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = [p for n, p in adapted.named_parameters() if "lora_A" in n]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_refuses_loudly(call: str, safe: bool, model: PreTrainedModel) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises((TypeError, RuntimeError)):
        getattr(adapted, call)(**{"safe_merge": safe})


def test_merging_works_after_dequantize(model: PreTrainedModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    first = logits(adapted)
    adapted.save_pretrained(tmp_path)
    plain = hfquant.dequantize(adapted.unload())
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    assert not packed(merged)
    assert torch.allclose(logits(merged), first, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("format", "grid"), [("native", "w4g32"), ("compressed_tensors", "w4g32sym")])
@pytest.mark.parametrize("param", ["gate_up_proj", "down_proj"])
def test_adapters_on_packed_experts_are_refused(
    param: str, format: str, grid: str, dense: Callable[[str], Path]
) -> None:
    config = HfQuantConfig({"steps": [{"method": "rtn", "search": 0}], "grid": grid, "format": format})
    model = load_with_transformers("mixtral", dense("mixtral"), quantization_config=config)
    wanted = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"experts.{param}"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"only 2d and 3d are supported|no `target_parameters` found"):
        peft.get_peft_model(model, wanted)
    beside = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[f"experts.{param}"])
    loudly: Any = pytest.warns(RuntimeWarning, match="no parameter was matched")
    if format == "native":
        loudly = pytest.raises(ValueError, match="only 2d and 3d are supported")
    with loudly:
        peft.get_peft_model(model, beside)


def test_adapters_on_experts_work_after_dequantize(dense: Callable[[str], Path]) -> None:
    config = HfQuantConfig({"steps": [{"method": "rtn", "search": 0}], "grid": "w4g32", "format": "native"})
    model = load_with_transformers("mixtral", dense("mixtral"), quantization_config=config)
    plain = hfquant.dequantize(model)
    wanted = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(plain, wanted)
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_add_adapter_saves_the_adapter_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_trainer_takes_it_with_adapters_only(model: PreTrainedModel, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert Trainer(adapted, arguments).model is adapted


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", ["w4g32sym", "w3g32asym", "w5g48asym", "w4g32a8"])
def test_fine_tuning_with_gradient_checkpointing(
    grid: str, dtype: torch.dtype, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    """As QLoRA does: packed weights, an adapter, activations computed again; gradients are those without."""
    grid, _, inputs = grid.partition("a8") if grid.endswith("a8") else (grid, "", None)
    activations = {} if inputs is None else {"activations": "a8"}
    recipe = {"steps": [{"method": "rtn", "search": 0}], "grid": grid, "format": "native", **activations}
    model = load_with_transformers("llama", dense("llama"), quantization_config=HfQuantConfig(recipe), dtype=dtype)
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    learned = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    gradients = []
    for again in (False, True):
        if again:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
        adapted.zero_grad()
        adapted(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for p in learned.values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(learned)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=4, learning_rate=1e-2, logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=True, bf16=dtype == torch.bfloat16, per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 4
    trainer = Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
