"""H is XXᵀ of what a layer really reads; layers that read the same input are found by looking."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hfquant.compress.activations import Stream
from hfquant.compress.observe import discover, observe, record_original
from hfquant.compress.streaming import Passage, Streamer
from hfquant.model.blocks import weights
from hfquant.model.inputs import model_inputs
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from hfquant.model.stream import stream_logits


def first_passage(folder: Path, work: Path) -> tuple[Streamer, Passage]:
    tokens = torch.randint(4, 260, (6, 24), generator=torch.Generator().manual_seed(0))
    streamer = Streamer(Skeleton(open_source(folder), torch.float32), tokens, work, batch=4)
    return streamer, next(streamer.passages())


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("gpt2", [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
    ],
)
def test_groups_and_sums(family: str, groups: list[set[str]], built: Callable[[str], Path], tmp_path: Path) -> None:
    streamer, passage = first_passage(built(family), tmp_path)
    block = streamer.skeleton.load_module(passage.stack.blocks[0])
    found = discover(block, passage, 0, weights(block))
    assert [{m.module.rpartition(".")[2] for m in g.members} for g in found] == groups
    statistics = observe(block, passage, 0, found)
    inputs: dict[str, list[torch.Tensor]] = {g.leader: [] for g in found}
    for leader, seen in inputs.items():
        module = block.get_submodule(leader)
        module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, 1).double()))
    for batch in range(len(passage.batches)):
        args, kwargs = passage.arguments(0, batch)
        block(*args, **kwargs)
    for group in found:
        X = torch.cat(inputs[group.leader])
        H = statistics[group, 0].H
        assert H is not None
        assert statistics[group, 0].tokens == len(X) == 6 * 24
        torch.testing.assert_close(H, (2 / len(X) * X.T @ X).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(H, H.T)


@torch.no_grad()
def test_experts_are_observed_one_by_one(built: Callable[[str], Path], tmp_path: Path) -> None:
    streamer, passage = first_passage(built("mixtral"), tmp_path)
    block = streamer.skeleton.load_module(passage.stack.blocks[0])
    found = [g for g in discover(block, passage, 0, weights(block)) if g.is_experts]
    assert [g.members[0].name.rpartition(".")[2] for g in found] == ["gate_up_proj", "down_proj"]
    statistics = observe(block, passage, 0, found)
    experts = streamer.skeleton.model.config.num_local_experts
    per_token = streamer.skeleton.model.config.num_experts_per_tok
    for group in found:
        counts = [statistics[group, e].tokens for e in range(experts) if (group, e) in statistics]
        assert sum(counts) == 6 * 24 * per_token


@torch.no_grad()
def test_C_is_H_when_nothing_was_compressed(built: Callable[[str], Path], tmp_path: Path) -> None:
    streamer, passage = first_passage(built("llama"), tmp_path)
    block = streamer.skeleton.load_module(passage.stack.blocks[0])
    found = discover(block, passage, 0, weights(block))
    after = Stream(tmp_path / "after", passage.stream.samples, passage.stream.shape, passage.stream.dtype)
    inputs = record_original(block, passage, 0, found, passage.stream, after)
    assert inputs.keys() == {g.leader for g in found}
    alone = passage.run(block, 0, tmp_path / "alone")
    assert after.path.read_bytes() == alone.path.read_bytes()
    for s in observe(block, passage, 0, found, inputs).values():
        assert s.H is not None
        assert s.C is not None
        torch.testing.assert_close(s.H, s.C, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "bloom", "gpt_neo", "gemma3", "bart", "t5", "mixtral", "qwen3_moe"]
)
def test_streamed_logits_are_the_models(family: str, built: Callable[[str], Path]) -> None:
    source = open_source(built(family))
    tokens = torch.randint(4, 260, (5, 20), generator=torch.Generator().manual_seed(1))
    streamed = torch.cat(list(stream_logits(source, tokens, dtype=torch.float32, batch=2)))
    skeleton = Skeleton(source, torch.float32)
    whole = type(skeleton.model).from_pretrained(built(family), dtype=torch.float32).eval()
    for at, n in ((0, 1), (1, 2), (3, 2)):  # as the batches are cut: experts round by their neighbours
        assert torch.equal(streamed[at : at + n], whole(**model_inputs(source.config, tokens[at : at + n])).logits)
