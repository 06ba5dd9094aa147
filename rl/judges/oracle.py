"""The oracle: a judge that knows the truth of the tiny world."""

from collections.abc import Sequence
from typing import Literal

from rl.judges.base import Judge, JudgeBase, JudgeContext
from rl.types import Completion, Judgement, Prompt, graded_score
from rl.world.grading import RULES_HASH, grade_answer


class OracleSettings(JudgeBase):
    """The exact judge of the tiny world; abstains on prompts without ground truth."""

    kind: Literal["oracle"] = "oracle"
    """Which judge."""

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
    if prompt.truth is None:
        return Judgement(None, None, "the prompt has no ground truth", OracleJudge.name, RULES_HASH)
    finished = completion.finish_reason == "stop"
    attributes, reason = grade_answer(prompt.truth, completion.text, finished)
    return Judgement(graded_score(attributes), attributes, reason, OracleJudge.name, RULES_HASH)
