"""Several judges, weighted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from cluster.errors import JudgeError
from rl.judges.base import Judge, all_ended
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
        self._refused: JudgeError | None = None

    @property
    def spent(self) -> dict[str, float]:
        """Of all together, and of each member, that its budget may go on."""
        each = enumerate(judge.spent.items() for judge, _ in self._members)
        return super().spent | {f"member{index}_{name}": value for index, items in each for name, value in items}

    def restore(self, spent: Mapping[str, float]) -> None:
        """See `Judge.restore`."""
        for index, (judge, _) in enumerate(self._members):
            prefix = f"member{index}_"
            judge.restore({key.removeprefix(prefix): one for key, one in spent.items() if key.startswith(prefix)})
        self._compared = Counter({name: int(spent.get(name, 0)) for name in ("compared", "disagreement")})
        self._add_up()

    def stop(self) -> None:
        for judge, _ in self._members:
            judge.stop()

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        try:
            verdicts = await all_ended(self._ask(judge, prompts, completions) for judge, _ in self._members)
        except JudgeError as error:
            raise self._refused or error from None
        mixed = [self._mix(groups) for groups in zip(*verdicts, strict=True)]
        self._add_up()
        return mixed

    async def _ask(
        self, judge: Judge, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        try:
            return await judge.grade(prompts, completions)
        except JudgeError as error:
            self._refused = self._refused or error
            self.stop()  # the others need not go on; what they have under way still comes and is kept
            raise

    def _add_up(self) -> None:
        self.tally = sum((judge.tally for judge, _ in self._members), self._compared)
        self.cost = sum(judge.cost for judge, _ in self._members)

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
