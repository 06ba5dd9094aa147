"""Judges behind an API, through the real client libraries, against a server on loopback that fails in every way."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, TypeAdapter

from cluster.errors import ConfigError, JudgeError
from rl.judges import JudgeContext, JudgeSettings, collect_keys
from rl.judges.ensemble import EnsembleJudge
from rl.judges.remote import RemoteJudge
from rl.pairs import PairSettings, make_pairs
from rl.types import Attributes, Completion, Judgement, Prompt
from tests.conftest import make_completion, make_prompt
from tests.judge_api import KEY, USAGE, JudgeApi, judge_api

SDKS: dict[str, dict[str, Any]] = {
    "google-genai": {"kind": "gemini", "sdk": "google-genai", "api_key_env": "JUDGE_KEY"},
    "google-generativeai": {"kind": "gemini", "sdk": "google-generativeai", "api_key_env": "JUDGE_KEY"},
    "openai": {"kind": "openai", "model": "judge-1", "api_key_env": "JUDGE_KEY"},
}

Make = Callable[..., RemoteJudge]
LOOP = asyncio.new_event_loop()  # a client serves one loop, as in the actor that holds the judge


@pytest.fixture
def api() -> Iterator[JudgeApi]:
    with judge_api() as running:
        yield running


@pytest.fixture(params=list(SDKS))
def make(request: pytest.FixtureRequest, api: JudgeApi, tmp_path: Path) -> Make:
    """Builds a judge of each kind from config fields."""

    def build(**fields: Any) -> RemoteJudge:
        url = fields.pop("url", api.url) + ("/v1" if request.param == "openai" else "")
        defaults = {"base_url": url, "cache": str(tmp_path / "cache.sqlite"), "timeout_s": 10, "retries": 2}
        settings: Any = TypeAdapter(JudgeSettings).validate_python({**SDKS[request.param], **defaults, **fields})
        return settings.build(JudgeContext(tmp_path, {"JUDGE_KEY": SecretStr(KEY)}))

    return build


def answers(*texts: str) -> list[Completion]:
    return [make_completion(text) for text in texts]


def grade(judge: RemoteJudge, *groups: list[Completion], prompts: list[Prompt] | None = None) -> list[list[Judgement]]:
    asked = prompts or [make_prompt(f"question {index}") for index in range(len(groups))]
    return LOOP.run_until_complete(judge.grade(asked, groups))


def test_all_answers_of_a_prompt_are_graded_in_one_call_that_shows_the_picture(make: Make, api: JudgeApi) -> None:
    (verdicts,) = grade(make(), answers("bad one", "good one", "bad one"))
    assert [one.score for one in verdicts] == [3, 12, 3]
    assert verdicts[1].attributes == Attributes(4, 4, 4, 1, 2)
    assert verdicts[1].reason == "about good one"
    assert len(api.requests) == 1
    assert "image" in str(api.requests[0]["body"])
    assert api.requests[0]["key"] == KEY


def test_the_schema_constrains_the_reply(make: Make, api: JudgeApi) -> None:
    grade(make(), answers("a", "good b"))
    body = str(api.requests[0]["body"])
    assert "helpfulness" in body
    assert "minItems" in body


@pytest.mark.parametrize(
    "fault", ["busy", "busy_date", "broken", "slow", "truncated", "wrong_schema", "empty", "cut_body", "page"]
)
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(make: Make, api: JudgeApi, fault: str) -> None:
    api.faults.append(fault)
    judge = make(timeout_s=1.0)
    (verdicts,) = grade(judge, answers("bad", "good"))
    assert [one.score for one in verdicts] == [3, 12]
    assert judge.tally["retries"] == 1
    assert len(api.requests) == 2


def test_the_wait_is_as_long_as_the_server_asks(make: Make, api: JudgeApi) -> None:
    api.faults.append("busy")
    grade(make(), answers("bad", "good"))
    assert api.times[1] - api.times[0] >= 1.2, "its own pause would be half a second at most"


@pytest.mark.parametrize(
    ("fault", "says"),
    [("broken", "HTTP 500"), ("wrong_schema", "helpfulness"), ("wrong_count", "grades 1 answers"),
     ("truncated", "max_output_tokens"), ("empty", "not what was asked for")],
)  # fmt: skip
def test_what_never_becomes_a_verdict_is_an_abstention(make: Make, api: JudgeApi, fault: str, says: str) -> None:
    api.always = fault
    judge = make(retries=1)
    (verdicts,) = grade(judge, answers("bad", "good"))
    assert [one.score for one in verdicts] == [None, None]
    assert says in verdicts[0].reason
    assert len(api.requests) == 2
    _, counts = make_pairs([make_prompt()], [answers("bad", "good")], [verdicts], PairSettings())
    assert counts["pairs"] == 0
    assert counts["abstentions"] == 2


@pytest.mark.parametrize("fault", ["blocked", "blocked_prompt"])
def test_a_safety_block_is_an_abstention_with_its_reason_and_is_not_asked_again(
    make: Make, api: JudgeApi, fault: str
) -> None:
    api.always = fault
    for _ in range(2):
        (verdicts,) = grade(make(), answers("bad", "good"))
        assert [one.score for one in verdicts] == [None, None]
        assert verdicts[0].reason.startswith("blocked: ")
    assert len(api.requests) == 1


def test_a_rerun_pays_nothing(make: Make, api: JudgeApi) -> None:
    first = grade(make(), answers("bad", "good"), answers("good", "worse"))
    again = make()
    assert grade(again, answers("bad", "good"), answers("good", "worse")) == first
    assert len(api.requests) == 2
    assert again.tally["cached"] == 2
    assert again.cost == 0


def test_another_endpoint_is_asked_anew(make: Make, api: JudgeApi) -> None:
    """The same name of a model elsewhere may be another model."""
    grade(make(), answers("bad", "good"))
    with judge_api() as other:
        judge = make(url=other.url)
        grade(judge, answers("bad", "good"))
        assert len(other.requests) == 1
        assert judge.tally["cached"] == 0


def test_another_picture_question_or_answer_is_another_question(make: Make, api: JudgeApi) -> None:
    judge = make()
    grade(judge, answers("bad", "good"), prompts=[make_prompt("a")])
    grade(judge, answers("bad", "good"), prompts=[make_prompt("a", None)])
    grade(judge, answers("bad", "good"), prompts=[make_prompt("b")])
    grade(judge, answers("bad", "good!"), prompts=[make_prompt("a")])
    assert len(api.requests) == 4


def test_a_reply_that_cannot_be_read_is_not_paid_for_again(make: Make, api: JudgeApi) -> None:
    """Unless longer replies are allowed."""
    api.always = "truncated"
    first = grade(make(retries=1), answers("bad", "good"))
    assert grade(make(retries=1), answers("bad", "good")) == first
    assert len(api.requests) == 2
    grade(make(retries=1, max_output_tokens=4096), answers("bad", "good"))
    assert len(api.requests) == 4


def test_the_same_question_twice_at_a_time_is_paid_for_once(make: Make, api: JudgeApi) -> None:
    api.delay = 0.1
    judge = make()
    first, second = grade(judge, answers("bad", "good"), answers("bad", "good"), prompts=[make_prompt()] * 2)
    assert first == second
    assert len(api.requests) == 1
    assert judge.tally["cached"] == 1


@pytest.mark.parametrize("limit", [None, 1800])
def test_many_calls_at_once_do_not_overspend_either(make: Make, api: JudgeApi, limit: float | None) -> None:
    api.delay = 0.05
    price = {"input_price": 1.0, "output_price": 10.0, "max_output_tokens": USAGE[1]}
    each = (USAGE[0] * 1.0 + USAGE[1] * 10.0) / 1e6
    judge = make(**price, budget=each * 5.5, concurrency=16, requests_per_minute=limit)
    with pytest.raises(JudgeError, match=r"judge\.budget"):
        grade(judge, *(answers("bad", f"good {index}") for index in range(40)))
    assert each * 4 <= judge.cost <= each * 5.5


def test_once_stopped_nothing_more_is_asked_whatever_waits(make: Make, api: JudgeApi) -> None:
    """Calls wait for the rate limit, and one for its next try in two minutes."""
    api.faults.extend(["", "", "", "broken"])
    judge = make(concurrency=8, requests_per_minute=240)

    async def stopped() -> None:
        asked = [make_prompt(f"question {index}") for index in range(20)]
        grading = asyncio.ensure_future(judge.grade(asked, [answers("bad", "good")] * 20))
        while len(api.requests) < 4:
            await asyncio.sleep(0.02)
        judge.stop()
        seen = len(api.requests)
        with pytest.raises(JudgeError, match="stopped"):
            await asyncio.wait_for(grading, 5)
        assert len(api.requests) <= seen + 1

    LOOP.run_until_complete(stopped())


def test_an_endpoint_that_asks_to_wait_for_hours_ends_it(make: Make, api: JudgeApi) -> None:
    api.always = "come_back_tomorrow"
    with pytest.raises(JudgeError, match="asks to wait 7200 s"):
        grade(make(), answers("bad", "good"))
    assert len(api.requests) == 1


def test_the_token_limit_holds_in_every_window(api: JudgeApi, tmp_path: Path) -> None:
    """A call takes some 700 tokens by the judge's own guess; half of a minute's 240,000 may go at once."""
    fields = {**SDKS["openai"], "base_url": f"{api.url}/v1", "cache": None, "tokens_per_minute": 240_000}
    judge: Any = TypeAdapter[Any](JudgeSettings).validate_python(fields)
    judge = judge.build(JudgeContext(tmp_path, {"JUDGE_KEY": SecretStr(KEY)}))
    grade(judge, *(answers("bad", f"good {index}") for index in range(180)))
    assert max(sum(start <= t < start + 1 for t in api.times) for start in api.times) < 178
    assert api.times[-1] - api.times[0] > 2


def test_cost_is_counted_and_the_budget_stops_before_it_is_overspent(make: Make, api: JudgeApi) -> None:
    price = {"input_price": 1.0, "output_price": 10.0, "max_output_tokens": USAGE[1]}
    each = (USAGE[0] * 1.0 + USAGE[1] * 10.0) / 1e6
    judge = make(**price, budget=each * 3.5, concurrency=1)
    with pytest.raises(JudgeError, match=r"judge\.budget"):
        grade(judge, *(answers("bad", f"good {index}") for index in range(6)))
    assert judge.cost == pytest.approx(3 * each)
    assert judge.tally["input_tokens"] == 3 * USAGE[0]
    assert len(api.requests) == 3
    grade(make(**price, budget=each * 3.5), *(answers("bad", f"good {index}") for index in range(6)))
    assert len(api.requests) == 6


def test_a_refused_key_stops_at_once_and_names_it_without_showing_it(make: Make, api: JudgeApi) -> None:
    api.always = "wrong_key"
    with pytest.raises(JudgeError, match="JUDGE_KEY") as refusal:
        grade(make(concurrency=1), answers("bad", "good"), answers("a", "b"))
    assert KEY not in str(refusal.value)
    assert len(api.requests) == 1


def test_an_endpoint_that_is_not_there_is_said_after_some_prompts(make: Make, api: JudgeApi) -> None:
    judge = make(base_url="http://127.0.0.1:9", retries=0)
    (verdicts,) = grade(judge, answers("bad", "good"))
    assert verdicts[0].score is None
    with pytest.raises(JudgeError, match="in a row"):
        grade(judge, *(answers("bad", f"good {index}") for index in range(20)))


def test_calls_in_flight_are_bounded(make: Make, api: JudgeApi) -> None:
    api.delay = 0.05
    grade(make(concurrency=3), *(answers("bad", f"good {index}") for index in range(12)))
    assert api.most_in_flight == 3


def test_the_rate_limit_holds_in_every_window(make: Make, api: JudgeApi) -> None:
    grade(make(requests_per_minute=600), *(answers("bad", f"good {index}") for index in range(30)))
    # 600 in a minute, of which 10 at once: the first 10 may come together, the next 20 take 2 s
    assert api.times[-1] - api.times[0] > 1.8
    assert max(sum(start <= t < start + 1 for t in api.times) for start in api.times) <= 21


def test_pairwise_asks_in_both_orders(make: Make, api: JudgeApi) -> None:
    judge = make(mode="pairwise")
    (verdicts,) = grade(judge, answers("bad", "good", "worse"))
    assert [one.score for one in verdicts] == [0.5, 2, 0.5]
    assert len(api.requests) == 6
    assert judge.tally["order_checked"] == judge.tally["order_consistent"] == 3
    (pair,), _ = make_pairs([make_prompt()], [answers("bad", "good")], [verdicts[:2]], PairSettings(margin=1))
    assert pair.completions.chosen.text == "good"


def test_a_judge_that_favours_a_position_gives_ties_and_is_found_out(make: Make, api: JudgeApi) -> None:
    api.favours_first = True
    judge = make(mode="pairwise")
    (verdicts,) = grade(judge, answers("bad", "good"))
    assert [one.score for one in verdicts] == [0.5, 0.5]
    assert judge.tally["order_checked"] == 1
    assert judge.tally["order_consistent"] == 0


def test_a_comparison_that_failed_in_one_order_counts_for_nobody(make: Make, api: JudgeApi) -> None:
    api.faults.append("blocked")
    (verdicts,) = grade(make(mode="pairwise", concurrency=1), answers("bad", "good"))
    assert [one.score for one in verdicts] == [None, None]
    assert all("blocked" in one.reason for one in verdicts)


def test_an_answer_of_which_a_comparison_is_missing_has_no_score(make: Make, api: JudgeApi) -> None:
    """Or a single win would count as many."""
    api.faults.extend(["", "blocked"])
    (verdicts,) = grade(make(mode="pairwise", concurrency=1), answers("bad", "good", "worse"))
    assert sum(one.score is None for one in verdicts) == 2
    assert sum(one.score is not None for one in verdicts) == 1


def test_scores_of_comparisons_do_not_depend_on_how_often_an_answer_was_given(make: Make) -> None:
    """Of four completions with two texts, the better text beats all others."""
    (verdicts,) = grade(make(mode="pairwise"), answers("bad", "good", "bad", "good"))
    assert [one.score for one in verdicts] == [0, 3, 0, 3]


def test_an_ensemble_ends_with_its_first_refusal_and_keeps_what_is_paid_for(api: JudgeApi, tmp_path: Path) -> None:
    api.delay = 0.3

    def build(url: str) -> RemoteJudge:
        fields = {**SDKS["openai"], "base_url": f"{url}/v1", "cache": str(tmp_path / "cache.sqlite"), "concurrency": 4}
        settings: Any = TypeAdapter(JudgeSettings).validate_python(fields)
        return settings.build(JudgeContext(tmp_path, {"JUDGE_KEY": SecretStr(KEY)}))

    asked = [make_prompt(f"question {index}") for index in range(20)]
    with judge_api() as other:
        other.always = "wrong_key"
        ensemble = EnsembleJudge([(build(api.url), 1.0), (build(other.url), 1.0)])
        with pytest.raises(JudgeError, match="refuses the call"):
            LOOP.run_until_complete(ensemble.grade(asked, [answers("bad", "good")] * 20))
    paid = len(api.requests)
    assert 1 <= paid <= 4
    again = build(api.url)
    grade(again, *[answers("bad", "good")] * 20, prompts=asked)
    assert again.tally["cached"] == paid


def test_the_key_is_in_no_log_and_no_file(
    make: Make, api: JudgeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    api.faults.extend(["broken", "busy"])
    grade(make(), answers("bad", "good"))
    assert KEY not in caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_missing_key_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    settings: Any = TypeAdapter(JudgeSettings).validate_python({"kind": "gemini"})
    with pytest.raises(ConfigError, match="GEMINI_API_KEY"):
        collect_keys(settings)


def test_an_endpoint_without_schemas_is_asked_without(api: JudgeApi, tmp_path: Path) -> None:
    api.knows_schemas = False
    fields = {"kind": "openai", "model": "m", "base_url": f"{api.url}/v1", "cache": None}
    judge = TypeAdapter[Any](JudgeSettings).validate_python(fields).build(JudgeContext(tmp_path))
    (verdicts,) = grade(judge, answers("bad", "good"))
    assert [one.score for one in verdicts] == [3, 12]
    assert len(api.requests) == 2
    grade(judge, answers("bad", "good one"))
    assert len(api.requests) == 3
