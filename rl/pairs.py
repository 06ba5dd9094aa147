"""From graded completions to preference pairs."""

from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from cluster.settings import Settings
from rl.types import Completion, Judgement, Pair, PairValues, Prompt


class PairSettings(Settings):
    """How pairs are chosen."""

    margin: float = Field(2, gt=0)
    """Least difference of scores (0 to 12 for a graded judge) between chosen and rejected; less is a tie."""


def make_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    judgements: Sequence[Sequence[Judgement]],
    settings: PairSettings,
) -> tuple[list[Pair], Counter[str]]:
    """The best against the worst completion of each prompt.

    No pair comes of a prompt whose answers are all the same text (`identical`), whose scores lie closer than
    the margin (`ties`), or of which fewer than two answers were judged (`unjudged`). Single answers the judge
    would not grade count as `abstentions`; they are never chosen nor rejected.
    """
    pairs: list[Pair] = []
    counts = Counter(pairs=0, ties=0, identical=0, unjudged=0, abstentions=0)
    for prompt, group, verdicts in zip(prompts, completions, judgements, strict=True):
        judged = [(one, verdict) for one, verdict in zip(group, verdicts, strict=True) if verdict.score is not None]
        counts["abstentions"] += len(group) - len(judged)
        if len(judged) < 2:
            counts["unjudged"] += 1
            continue
        if len({one.text for one, _ in judged}) == 1:
            counts["identical"] += 1
            continue
        best = max(judged, key=_score)
        worst = min(judged, key=_score)
        margin = _score(best) - _score(worst)
        if margin < settings.margin or best[0].text == worst[0].text:
            counts["ties"] += 1
            continue
        counts["pairs"] += 1
        pairs.append(
            Pair(
                prompt=prompt,
                completions=PairValues(best[0], worst[0]),
                judgements=PairValues(best[1], worst[1]),
                margin=margin,
                source="online",
                policy_version=best[0].policy_version,
            )
        )
    return pairs, counts


def _score(judged: tuple[Completion, Judgement]) -> float:
    score = judged[1].score
    assert score is not None
    return score
