"""Each pair gets the one verdict that is true, with the reason; done twice, nothing is done twice."""

from dataclasses import replace
from typing import Any

import pytest

from hfquant.conversion.fleet.reconcile import apply, make_plan
from hfquant.conversion.fleet.sight import Original, Result
from hfquant.conversion.job import Failure, Job, Progress, Submitted
from hfquant.conversion.settings import Limits
from hfquant.errors import LimitError
from tests.conversion.fleet.recorded import Recorded, made, manifest

ONE, TWO, NEW = "1" * 40, "2" * 40, "9" * 40
MODELS = {"org/one": ONE, "org/two": TWO}
TARGETS = ("acme/one-rtn-w4g64", "acme/one-rtn-w8", "acme/two-rtn-w8")


def everything() -> dict[str, Result]:
    return {
        TARGETS[0]: made("org/one", ONE, "rtn-w4g64"),
        TARGETS[1]: made("org/one", ONE, "rtn-w8"),
        TARGETS[2]: made("org/two", TWO, "rtn-w8"),
    }


def kinds(sight: Recorded, **more: Any) -> list[str]:
    return [v.kind for v in make_plan(more.pop("fleet", manifest()), sight, **more).verdicts]


def job(state: str, **changes: Any) -> Job:
    request = {"model": "org/two", "target": TARGETS[2], "recipe": manifest().recipe("rtn-w8").model_dump(mode="json")}
    made = Job("j", "u", state, request, "k", TWO, 1, 100.0, 100.0, 200.0, (), Progress())  # type: ignore[arg-type]
    return replace(made, **changes)


def test_nothing_there_is_missing_everything_there_is_settled() -> None:
    plan = make_plan(manifest(), Recorded(MODELS))
    assert [v.kind for v in plan.verdicts] == ["missing"] * 3
    assert [v.wanted.target for v in plan.due] == list(TARGETS)
    assert plan.drift
    plan = make_plan(manifest(), Recorded(MODELS, everything()))
    assert [v.kind for v in plan.verdicts] == ["up to date"] * 3
    assert not plan.due
    assert not plan.drift


def test_a_moved_original_makes_exactly_its_pairs_stale() -> None:
    plan = make_plan(manifest(), Recorded(MODELS | {"org/one": NEW}, everything()))
    assert [v.kind for v in plan.verdicts] == ["stale", "stale", "up to date"]
    assert plan.verdicts[0].reasons == (f"the original moved from {ONE[:7]} to {NEW[:7]}",)
    assert plan.verdicts[0].wanted.request().revision == NEW


def test_a_changed_recipe_a_new_version_and_a_damaged_file_are_each_named() -> None:
    fleet = manifest(recipes={"rtn-w8": {"steps": [{"method": "rtn"}], "grid": "w8g64"}})
    assert kinds(Recorded(MODELS, everything()), fleet=fleet) == ["up to date", "stale", "stale"]
    older = everything() | {TARGETS[0]: made("org/one", ONE, "rtn-w4g64", "0.0.9")}
    plan = make_plan(manifest(), Recorded(MODELS, older))
    assert "hfquant changed from 0.0.9" in plan.verdicts[0].reasons[0]
    broken = everything() | {TARGETS[0]: replace(everything()[TARGETS[0]], broken="model.safetensors is missing")}
    plan = make_plan(manifest(), Recorded(MODELS, broken))
    assert (plan.verdicts[0].kind, plan.verdicts[0].reasons) == ("stale", ("model.safetensors is missing",))


def test_what_is_not_ours_is_left_alone() -> None:
    theirs = everything() | {TARGETS[0]: Result(True, NEW), TARGETS[1]: made("else/where", ONE, "rtn-w8")}
    plan = make_plan(manifest(), Recorded(MODELS, theirs))
    assert [v.kind for v in plan.verdicts] == ["foreign", "foreign", "up to date"]
    assert not plan.due


@pytest.mark.parametrize(
    ("original", "why"),
    [
        (Original("org/two", TWO, 10**12, {"license": "mit"}), "billion"),
        (Original("org/two", TWO, 10, {"license": "cc-by-nc-4.0"}), "commercial"),
        (Original("org/two", TWO, 10, {"license": "mit"}, quantized=True), "quantized"),
    ],
)
def test_what_may_not_be_converted_is_blocked(original: Original, why: str) -> None:
    plan = make_plan(manifest(), Recorded(MODELS | {"org/two": original}))
    assert plan.verdicts[2].kind == "blocked"
    assert why in plan.verdicts[2].reasons[0]
    assert len(plan.due) == 2


def test_terms_that_were_accepted_do_not_block() -> None:
    fleet = manifest(defaults={"namespace": "acme", "accept_terms": True})
    sight = Recorded(MODELS | {"org/two": Original("org/two", TWO, 10, {"license": "cc-by-nc-4.0"})})
    assert kinds(sight, fleet=fleet)[2] == "missing"


def test_an_original_that_is_gone_is_blocked_and_the_rest_goes_on() -> None:
    assert kinds(Recorded({"org/one": ONE})) == ["missing", "missing", "blocked"]


def test_jobs_that_run_or_failed() -> None:
    sight = Recorded(MODELS)
    assert kinds(sight, jobs=[job("running")])[2] == "running"
    failed = job("failed", failure=Failure("ResourceError", "no memory"), finished=1000.0)
    plan = make_plan(manifest(), sight, jobs=[failed], now=1100.0)
    assert (plan.verdicts[2].kind, plan.verdicts[2].due) == ("failed", False)
    assert "the next in 8 min" in plan.verdicts[2].reasons[1]
    assert make_plan(manifest(), sight, jobs=[failed], now=1601.0).verdicts[2].due
    again = replace(failed, attempt=3)
    assert not make_plan(manifest(), sight, jobs=[again], now=3300.0).verdicts[2].due, "pauses grow"
    assert make_plan(manifest(), sight, jobs=[again], now=3401.0).verdicts[2].due


def test_a_failed_gate_is_not_tried_again_until_something_changes() -> None:
    failed = job("failed", failure=Failure("QualityError", "perplexity collapsed"), finished=0.0)
    plan = make_plan(manifest(), Recorded(MODELS), jobs=[failed], now=1e9)
    assert (plan.verdicts[2].kind, plan.verdicts[2].due) == ("failed", False)
    moved = make_plan(manifest(), Recorded(MODELS | {"org/two": NEW}), jobs=[failed], now=1e9)
    assert (moved.verdicts[2].kind, moved.verdicts[2].due) == ("missing", True)


def test_globs_choose() -> None:
    plan = make_plan(manifest(), Recorded(MODELS))
    assert len(plan.only(["org/one"]).due) == 2
    assert len(plan.only(["*/two*", "org/one rtn-w8"]).due) == 2
    assert len(plan.only(["rtn-w8"]).due) == 2
    assert not plan.only(["nothing"]).due


def test_a_search_and_an_entry_of_the_same_model_are_one_pair() -> None:
    entries = [{"id": "org/one", "recipes": ["rtn-w8"]}, {"search": {"author": "org"}, "recipes": ["rtn-w8"]}]
    plan = make_plan(manifest(models=entries), Recorded(MODELS))
    assert [v.wanted.target for v in plan.verdicts] == [TARGETS[1], TARGETS[2]]


def test_only_what_a_webhook_names_is_looked_at() -> None:
    sight = Recorded(MODELS)
    make_plan(manifest(), sight, models=["org/two"])
    assert sight.asked == ["org/two", TARGETS[2]]


class Service:
    def __init__(self, room: int = 99) -> None:
        self.asked: list[Any] = []
        self.room = room

    def submit(self, request: Any, user: str, token: Any, expires: Any = None) -> Submitted:
        if len(self.asked) == self.room:
            raise LimitError("the queue is full")
        self.asked.append(request)
        return Submitted(str(len(self.asked)), True)


def test_what_is_due_is_asked_for_up_to_a_number_and_to_the_limits() -> None:
    plan = make_plan(manifest(), Recorded(MODELS))
    service = Service()
    done = apply(plan, service, "u", most=2)  # type: ignore[arg-type]
    assert [a.job for a in done] == ["1", "2"]
    assert [r.target for r in service.asked] == list(TARGETS[:2])
    done = apply(plan, Service(room=1), "u")  # type: ignore[arg-type]
    assert [a.error for a in done] == [None, "the queue is full"]


def test_rented_hardware_is_counted_at_its_most() -> None:
    terms = {"namespace": "acme", "executor": "hf-jobs", "flavor": "a10g-small", "max_usd": 2.5, "timeout": "1h"}
    plan = make_plan(manifest(defaults=terms), Recorded(MODELS))
    assert plan.usd == 7.5
    request = plan.due[0].wanted.request()
    assert (request.executor, request.hardware, request.max_usd, request.timeout) == (
        "hf-jobs",
        "a10g-small",
        2.5,
        3600,
    )
    unlimited = {key: value for key, value in terms.items() if key != "max_usd"}
    assert make_plan(manifest(defaults=unlimited), Recorded(MODELS)).usd == 3 * Limits().usd
