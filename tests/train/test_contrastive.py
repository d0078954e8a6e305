"""Token-level contrastive distillation, against its formula written out."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hfquant.train.contrastive import Bank, contrastive, soft_cross_entropy, token_scale


def states(seed: int, n: int = 2, seq: int = 6, dim: int = 8) -> Tensor:
    return normalize(torch.randn(n, seq, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def test_it_is_the_papers_sum_over_tokens_and_padding_is_in_none_of_them() -> None:
    s, t = states(0), states(1)
    terms = []
    for k, length in enumerate((6, 4)):
        for i in range(length):
            likeness = [math.exp(float(s[k, i] @ t[k, j]) / 0.1) for j in range(length)]
            terms.append(-math.log(likeness[i] / sum(likeness)))
    found = contrastive(s, t, MASK, 0.1)
    assert float(found) == pytest.approx(sum(terms) / 10, rel=1e-4)
    moved = t.clone()
    moved[1, 4:] = states(5)[1, 4:]
    assert float(contrastive(s, moved, MASK, 0.1)) == float(found)


def test_fewer_negatives_are_drawn_from_the_same_sequence() -> None:
    s, t = states(0), states(1)
    everything = float(contrastive(s, t, MASK, 0.1))
    drawn = [contrastive(s, t, MASK, 0.1, 2, torch.Generator().manual_seed(i)) for i in range(20)]
    assert all(0 < float(x) <= everything for x in drawn)
    assert len({float(x) for x in drawn}) > 10
    assert float(contrastive(s, t, MASK, 0.1, 5)) == pytest.approx(everything)


def test_a_student_like_its_teacher_loses_least() -> None:
    t = states(1)
    assert float(contrastive(t, t, MASK, 0.1)) < float(contrastive(states(0), t, MASK, 0.1))


def test_the_bank_smooths_what_it_saw_before_whatever_the_padding(tmp_path: Path) -> None:
    bank, ids = Bank(0.25), torch.tensor([7, 3])
    first, again = states(0), states(1).requires_grad_()
    assert torch.allclose(bank.smooth(ids, first, MASK), first, atol=1e-6)
    smoothed = bank.smooth(ids.flip(0), again.flip(0), MASK.flip(0)).flip(0)
    expected = normalize(0.25 * first.to(torch.float16).float() + 0.75 * again, dim=-1)
    assert torch.allclose(smoothed[MASK], expected[MASK], atol=1e-3)
    smoothed.sum().backward()
    assert again.grad is not None
    bank.save(tmp_path / "bank.safetensors")
    other = Bank(0.25)
    other.load(tmp_path / "bank.safetensors")
    shorter, mask = states(2)[1:, :4], MASK[1:, :4]  # the same sequence in a batch that needs no padding
    assert torch.equal(bank.smooth(ids[1:], shorter, mask), other.smooth(ids[1:], shorter, mask))
    assert [len(bank), len(other)] == [2, 2]


def test_the_gradient_of_the_soft_cross_entropy_is_the_difference_of_the_predictions() -> None:
    student = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([[1.0, 1, 0], [2, 1, 1]])
    soft_cross_entropy(student, teacher, weight).backward()
    expected = (student.softmax(-1) - teacher.softmax(-1)) * weight[..., None] / weight.sum()
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("negatives", [0, 3])
def test_the_gradient_of_the_contrast_pulls_to_the_own_token_and_from_the_others(negatives: int) -> None:
    """∂ℓ_i/∂q̄_i = (Σ_j p_ij q_j − q_i)/τ, p_i the softmax over S_i; and the finite differences of ℓ say so too."""
    student, teacher = states(0).requires_grad_(), states(1)

    def lost(q: torch.Tensor) -> torch.Tensor:
        return contrastive(q, teacher, MASK, 0.5, negatives, torch.Generator().manual_seed(4))

    lost(student).backward()
    assert student.grad is not None
    assert (student.grad[~MASK] == 0).all()
    if not negatives:
        similar = (student.detach() @ teacher.transpose(1, 2) / 0.5).masked_fill(~MASK[:, None, :], -torch.inf)
        expected = (similar.softmax(-1) @ teacher - teacher) / 0.5 * MASK[..., None] / MASK.sum()
        torch.testing.assert_close(student.grad, expected)
    for n in range(8):
        way = torch.randn(student.shape, generator=torch.Generator().manual_seed(n))
        ends = [float(lost(student.detach() + h * way)) for h in (1e-2, -1e-2)]
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float((student.grad * way).sum()), rel=2e-2, abs=1e-3)


def test_tokens_count_one_on_average_and_more_where_the_teacher_is_unsure() -> None:
    teacher = torch.zeros(1, 4, 5)
    teacher[0, 0, 2] = 20.0  # sure, and right
    labels, mask = torch.full((1, 4), 2), torch.tensor([[True, True, True, False]])
    found = token_scale(teacher, labels, mask)
    assert float(found.sum()) == pytest.approx(3)
    assert found[0, 0] < found[0, 1]
    assert found[0, 3] == 0
