"""Several judges, weighted."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from rl.judges.base import Judge
from rl.types import Completion, Judgement, Prompt


class EnsembleJudge(Judge):
    """The weighted mean of its members' scores, each as it is: choose weights that fit their scales.

    A member that abstains on any completion of a prompt has no say in that prompt, lest completions be compared
    across different judges; if no member is left, the ensemble abstains. `disagreement` in the tally counts, of
    `compared` pairs of completions that two members both order, those that they order oppositely.
    """

    def __init__(self, members: Sequence[tuple[Judge, float]]):
        super().__init__()
        self.name = "ensemble(" + ", ".join(judge.name for judge, _ in members) + ")"
        self.absolute = all(judge.absolute for judge, _ in members)
        self._members = list(members)
        self._compared: Counter[str] = Counter()
        self._before: tuple[Counter[str], float] = (Counter(), 0.0)

    def restore(self, spent: Mapping[str, float]) -> None:
        super().restore(spent)
        self._before = (self.tally.copy(), self.cost)

    def stop(self) -> None:
        for judge, _ in self._members:
            judge.stop()

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        verdicts = await asyncio.gather(*(judge.grade(prompts, completions) for judge, _ in self._members))
        mixed = [self._mix(groups) for groups in zip(*verdicts, strict=True)]
        self.tally = sum((judge.tally for judge, _ in self._members), self._compared + self._before[0])
        self.cost = self._before[1] + sum(judge.cost for judge, _ in self._members)
        return mixed

    def _mix(self, groups: Sequence[Sequence[Judgement]]) -> list[Judgement]:
        """`groups` holds one member's judgements of a prompt each."""
        voting = [
            (group, weight)
            for group, (_, weight) in zip(groups, self._members, strict=True)
            if all(one.score is not None for one in group)
        ]
        self._count_disagreement([[one.score or 0.0 for one in group] for group, _ in voting])
        total = sum(weight for _, weight in voting)
        mixed = []
        for index in range(len(groups[0])):
            verdicts = [group[index] for group in groups]
            score = sum(weight * (group[index].score or 0.0) for group, weight in voting) / total if voting else None
            reason = " | ".join(f"{one.judge} {_short(one.score)}: {one.reason}" for one in verdicts)
            mixed.append(Judgement(score, None, reason, self.name, "+".join(one.prompt_hash for one in verdicts)))
        return mixed

    def _count_disagreement(self, scores: Sequence[Sequence[float]]) -> None:
        for one, other in combinations(scores, 2):
            for i, j in combinations(range(len(one)), 2):
                orders = (one[i] - one[j]) * (other[i] - other[j])
                self._compared["compared"] += orders != 0
                self._compared["disagreement"] += orders < 0


def _short(score: float | None) -> str:
    return "abstains" if score is None else f"{score:g}"
