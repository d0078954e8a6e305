import math
import re
from typing import Any

import pytest

from hfquant.errors import QualityError
from hfquant.measure.gate import Gate, broken, gate, verdict

ALL = Gate(max_ppl_ratio=1.5, max_kl=0.2, min_top1_agreement=0.8)


def measured(**changes: Any) -> dict[str, Any]:
    good = {"perplexity": 11.0, "reference_perplexity": 10.0, "kl": 0.1, "top1_agreement": 0.9}
    return {"evaluation": good | changes}


def test_a_good_model_passes() -> None:
    gate(measured(), ALL)
    assert verdict(measured(), ALL) == {
        "passed": True,
        "limits": {"max_ppl_ratio": 1.5, "max_kl": 0.2, "min_top1_agreement": 0.8},
        "broken": [],
    }


def test_limits_themselves_are_allowed() -> None:
    gate(measured(perplexity=15.0, kl=0.2, top1_agreement=0.8), ALL)


def test_every_broken_limit_is_told_with_its_numbers() -> None:
    bad = measured(perplexity=20.5, kl=0.31, top1_agreement=0.42)
    with pytest.raises(QualityError) as error:
        gate(bad, ALL)
    assert str(error.value) == (
        "the compressed model was written, but its quality is below the gate:\n"
        "- perplexity is 2.05 times the original's (10 -> 20.5), at most 1.5 times is allowed\n"
        "- KL divergence is 0.31 nats per token, at most 0.2 is allowed\n"
        "- top-1 agreement is 0.42, at least 0.8 is needed\n\n"
        "hint: use more bits, smaller groups or a calibrated method; to accept this quality, relax the"
        " recipe's `gate` (`--set gate.max_ppl_ratio=null` switches the limit on perplexity off)"
    )
    assert error.value.exit_code == 3
    assert verdict(bad, ALL)["passed"] is False


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_passes_nothing(value: float | None) -> None:
    assert len(broken(measured(perplexity=value), ALL)) == 1
    assert len(broken(measured(kl=value), ALL)) == 1
    if value != math.inf:
        assert len(broken(measured(top1_agreement=value), ALL)) == 1
    assert len(broken({}, ALL)) == 3


def test_limits_that_are_off_are_not_looked_at() -> None:
    off = Gate(max_ppl_ratio=None)
    assert broken(measured(perplexity=math.nan, kl=9.0), off) == []
    assert broken({}, off) == []


def test_by_default_only_a_collapse_of_perplexity_is_stopped() -> None:
    assert broken(measured(perplexity=29.0, kl=5.0, top1_agreement=0.1), Gate()) == []
    [failure] = broken(measured(perplexity=31.0), Gate())
    assert re.search(r"3\.1 times .* at most 3 times", failure)
