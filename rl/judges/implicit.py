"""The policy judges itself: DPO's implicit reward (SPA, Kim et al. 2024, arXiv 2406.04412)."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rl.judges.base import Judge, JudgeBase, JudgeContext
from rl.judges.instructions import digest
from rl.types import Completion, Judgement, Prompt


class ImplicitSettings(JudgeBase):
    """The policy's own reward against the reference, beta (log pi - log pi_ref). Says nothing before the policy has
    learned some preference: start from one that was aligned on a small set of true pairs."""

    kind: Literal["implicit"]
    """Which judge."""
    beta: float = Field(0.1, gt=0)
    """Scale of the reward; `pairs.margin` counts in it."""

    @property
    def needs_reference(self) -> bool:
        return True

    def build(self, context: JudgeContext) -> "ImplicitJudge":
        """The judge."""
        return ImplicitJudge(self.beta, context)


class ImplicitJudge(Judge):
    """Compares the sampler's log-probs with the reference's."""

    name = "implicit"

    def __init__(self, beta: float, context: JudgeContext):
        super().__init__()
        self._beta = beta
        assert context.reference_logps is not None
        self._reference_logps = context.reference_logps

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        flat = [(prompt, one) for prompt, group in zip(prompts, completions, strict=True) for one in group]
        reference = iter(await self._reference_logps(flat))
        self.tally["calls"] += len(flat)
        return [[self._judgement(one, next(reference)) for one in group] for group in completions]

    def _judgement(self, completion: Completion, reference_logp: float) -> Judgement:
        reward = self._beta * (sum(completion.logps) - reference_logp)
        reason = f"log pi - log pi_ref = {reward / self._beta:.3f} nats"
        return Judgement(reward, None, reason, self.name, digest(self.name, self._beta)[:12])
