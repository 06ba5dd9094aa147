"""The oracle: a judge that knows the truth of the tiny world."""

from collections.abc import Sequence
from typing import Literal

from cluster.errors import DataError
from rl.judges.base import Judge, JudgeBase, JudgeContext
from rl.types import Completion, Judgement, Prompt, graded_score
from rl.world.grading import RULES_HASH, grade_answer


class OracleSettings(JudgeBase):
    """The exact judge of the tiny world; needs prompts with ground truth."""

    kind: Literal["oracle"] = "oracle"
    """Which judge."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """See `JudgeBase.check`."""
        if unknown := [prompt.id for prompt in prompts if prompt.truth is None]:
            raise DataError(
                f"prompt {unknown[0]} has no `truth`, by which the oracle judges ({len(unknown)} of {len(prompts)} "
                f"have none); choose another judge, for example judge.kind=gemini, openai or rules"
            )

    def top_score(self, completions: int) -> float | None:
        return 12.0

    def build(self, context: JudgeContext) -> "OracleJudge":
        """The judge."""
        return OracleJudge()


class OracleJudge(Judge):
    """Grades by the scene graph and the true answers."""

    name = "oracle"

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        self.tally["calls"] += len(prompts)
        return [[_judge(prompt, one) for one in group] for prompt, group in zip(prompts, completions, strict=True)]


def _judge(prompt: Prompt, completion: Completion) -> Judgement:
    assert prompt.truth is not None, "see OracleSettings.check"
    finished = completion.finish_reason != "length"
    attributes, reason = grade_answer(prompt.truth, completion.text, finished)
    return Judgement(graded_score(attributes), attributes, reason, OracleJudge.name, RULES_HASH)
