"""Judges that need no network: rules, the policy's own reward, ensembles."""

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cluster.errors import ConfigError, DataError, JudgeError
from rl.judges import Judge, JudgeContext, JudgeSettings, OracleSettings
from rl.judges.oracle import OracleJudge
from rl.types import WRITTEN, Completion, Prompt
from tests.conftest import make_completion, make_prompt

GROUP = [make_completion("short"), make_completion("rather long"), make_completion("")]


def build(fields: dict[str, Any], context: JudgeContext | None = None) -> Judge:
    settings: Any = TypeAdapter(JudgeSettings).validate_python(fields)
    return settings.build(context or JudgeContext(Path("unused")))


def scores(judge: Judge, group: Sequence[Completion] = GROUP) -> list[float | None]:
    (verdicts,) = asyncio.run(judge.grade([make_prompt()], [group]))
    return [one.score for one in verdicts]


def longest(prompt: Prompt, completions: Sequence[Completion]) -> list[float | None]:
    return [len(one.text) or None for one in completions]


def shortest(prompt: Prompt, completions: Sequence[Completion]) -> list[float | None]:
    return [-len(one.text) for one in completions]


def first_only(prompt: Prompt, completions: Sequence[Completion]) -> list[float | None]:
    return [1.0]


def rule(name: str) -> dict[str, Any]:
    return {"kind": "rules", "function": f"{__name__}:{name}"}


def test_a_function_named_in_the_config_judges() -> None:
    assert scores(build(rule("longest"))) == [5, 11, None]


@pytest.mark.parametrize(
    ("function", "says"),
    [("nothing", "package.module:function"), ("no.such:function", "cannot be imported"),
     (f"{__name__}:missing", "cannot be imported"), (f"{__name__}:GROUP", "not a function")],
)  # fmt: skip
def test_a_function_that_is_not_there_is_refused(function: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build({"kind": "rules", "function": function})


def test_a_function_that_gives_too_few_scores_is_refused_by_name_and_prompt() -> None:
    with pytest.raises(JudgeError, match=rf"first_only.*{make_prompt().id}.*1 scores for 3"):
        scores(build(rule("first_only")))


def test_the_implicit_reward_is_beta_times_the_log_ratio() -> None:
    async def reference(completions: Sequence[tuple[Prompt, Completion]]) -> list[float]:
        return [-3.0, -1.0]

    group = [dataclasses.replace(make_completion(), logps=logps) for logps in ((-0.5, -0.5), (-2.0, -1.0))]
    judge = build({"kind": "implicit", "beta": 0.5}, JudgeContext(Path("unused"), reference_logps=reference))
    assert scores(judge, group) == [1.0, -1.0]


def test_an_ensemble_weighs_scores_and_counts_disagreement() -> None:
    fields = {"kind": "ensemble", "members": [{"judge": rule("longest"), "weight": 3}, {"judge": rule("shortest")}]}
    judge = build(fields)
    assert scores(judge, GROUP[:2]) == [(3 * 5 - 5) / 4, (3 * 11 - 11) / 4]
    assert judge.tally["compared"] == 1
    assert judge.tally["disagreement"] == 1


def test_an_ensemble_goes_on_from_what_it_and_its_members_spent() -> None:
    fields = {"kind": "ensemble", "members": [{"judge": rule("longest"), "weight": 3}, {"judge": rule("shortest")}]}
    first, resumed = build(fields), build(fields)
    scores(first, GROUP[:2])
    resumed.restore(json.loads(json.dumps(first.spent)))
    assert resumed.spent == first.spent
    scores(resumed, GROUP[:2])
    assert resumed.tally["compared"] == 2
    assert resumed.spent["member0_calls"] == 2
    assert resumed.spent["calls"] == 4


def test_an_answer_is_unfinished_only_where_it_was_cut() -> None:
    truth = {"kind": "count", "answer": "2"}
    prompt = make_prompt("How many objects are there?", truth=truth)
    endings = ("stop", WRITTEN, "length")
    group = [dataclasses.replace(make_completion("2."), finish_reason=ending) for ending in endings]
    (verdicts,) = asyncio.run(OracleJudge().grade([prompt], [group]))
    assert [one.attributes.coherence for one in verdicts if one.attributes] == [4, 4, 1]


def test_the_oracle_refuses_prompts_without_truth_by_id() -> None:
    prompt = make_prompt()
    with pytest.raises(DataError, match=rf"prompt {prompt.id} has no `truth`.*1 of 2.*judge.kind"):
        OracleSettings().check([make_prompt(truth={"kind": "count", "answer": "2"}), prompt])


def test_a_member_that_abstains_on_one_answer_has_no_say_in_the_prompt() -> None:
    fields = {"kind": "ensemble", "members": [{"judge": rule("longest")}, {"judge": rule("shortest")}]}
    assert scores(build(fields)) == [-5, -11, 0]
    both = {"kind": "ensemble", "members": [{"judge": rule("longest")}, {"judge": rule("longest")}]}
    assert scores(build(both)) == [None, None, None]
