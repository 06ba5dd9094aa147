"""From judged completions to preference pairs."""

import itertools
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from cluster.errors import DataError
from cluster.settings import Settings
from rl.types import WRITTEN, Attributes, Completion, Judgement, Pair, PairValues, Prompt

Rule = Literal["best_vs_worst", "best_vs_random_below", "all_pairs", "best_vs_reference"]


class AttributeWeights(Settings):
    """What each attribute counts in a score. The paper (arXiv 2402.10884) adds up the first three."""

    helpfulness: float = 1.0
    """HelpSteer's helpfulness, 0 to 4."""
    correctness: float = 1.0
    """HelpSteer's correctness, 0 to 4."""
    coherence: float = 1.0
    """HelpSteer's coherence, 0 to 4."""
    complexity: float = 0.0
    """HelpSteer's complexity, 0 to 4."""
    verbosity: float = 0.0
    """HelpSteer's verbosity, 0 to 4."""

    def score(self, attributes: Attributes) -> float:
        """The weighted sum."""
        return float(sum(getattr(self, name) * value for name, value in attributes._asdict().items()))


class UncertainSettings(Settings):
    """Noise-aware refinement of SPA (arXiv 2406.04412): the least certain labels are taken for partly wrong. SPA looks
    at the margin under a policy extrapolated from the reference, which on whole sequences only scales the margin."""

    quantile: float = Field(0.1, gt=0, lt=1)
    """Share of pairs, those with the smallest margins, that counts as uncertain."""
    label_smoothing: float = Field(0.1, gt=0, lt=0.5)
    """Assumed probability that an uncertain label is wrong."""
    window: int = Field(50, ge=1)
    """Steps over which the quantile is taken."""


class PairSettings(Settings):
    """How judged completions make pairs."""

    kind: Literal["online"] = "online"
    """Where pairs come from: the policy's own completions."""
    rule: Rule = "best_vs_worst"
    """`best_vs_random_below`: rejected is drawn among those at least `margin` lower (arXiv 2402.10884); `all_pairs`:
    every two answers that far apart; `best_vs_reference`: the best answer and the prompt's reference answer, whichever
    the judge prefers chosen."""
    margin: float = Field(2, gt=0)
    """Least difference of scores between chosen and rejected; less is a tie. Scores go from 0 to 12 with a graded
    judge; with a pairwise one they count the answers beaten."""
    weights: AttributeWeights = AttributeWeights()
    """How a graded judge's attributes make the score."""
    length_penalty: float = Field(0.0, ge=0)
    """Points taken off a score per 100 tokens of the answer, against a judge that loves length."""
    uncertain: UncertainSettings | None = None
    """Smooth the labels of the pairs with the smallest margins; heeded by `loss.kind` sigmoid, cdpo, rpo and mpo."""


def check_references(prompts: Sequence[Prompt], settings: PairSettings) -> None:
    """Refuse prompts of which the rule could never make a pair.

    Raises:
        DataError: names one by id.
    """
    if settings.rule != "best_vs_reference":
        return
    if without := [prompt.id for prompt in prompts if not prompt.reference_answer]:
        raise DataError(
            f"prompt {without[0]} has no reference answer, which pairs.rule best_vs_reference compares with "
            f"({len(without)} of {len(prompts)} have none); leave them out, or choose another rule"
        )


def make_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    judgements: Sequence[Sequence[Judgement]],
    settings: PairSettings,
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of each prompt by the rule.

    No pair comes of a prompt whose answers are all the same text (`identical`), whose scores lie closer than
    the margin (`ties`), or of which fewer than two answers were judged (`unjudged`). Single answers the judge
    would not grade count as `abstentions`; they are never chosen nor rejected.
    """
    pairs: list[Pair] = []
    counts = Counter(pairs=0, ties=0, identical=0, unjudged=0, abstentions=0)
    for prompt, group, verdicts in zip(prompts, completions, judgements, strict=True):
        judged = [
            _Judged(one, verdict, score)
            for one, verdict in zip(group, verdicts, strict=True)
            if (score := final_score(one, verdict, settings)) is not None
        ]
        counts["abstentions"] += len(group) - len(judged)
        if len(judged) < 2:
            counts["unjudged"] += 1
            continue
        if len({one.completion.text for one in judged}) == 1:
            counts["identical"] += 1
            continue
        made = [
            _pair(prompt, chosen, rejected)
            for chosen, rejected in _RULES[settings.rule](prompt, judged, settings.margin)
            if chosen.score - rejected.score >= settings.margin and chosen.completion.text != rejected.completion.text
        ]
        counts["pairs"] += len(made)
        counts["ties"] += not made
        pairs += made
    return pairs, counts


def final_score(completion: Completion, judgement: Judgement, settings: PairSettings) -> float | None:
    """What a completion is ranked by; None if the judge abstained."""
    if judgement.score is None:
        return None
    score = judgement.score if judgement.attributes is None else settings.weights.score(judgement.attributes)
    return score - settings.length_penalty * len(completion.token_ids) / 100


class UncertainPairs:
    """Marks the pairs whose margin lies in the lowest quantile of the last steps."""

    def __init__(self, settings: UncertainSettings):
        self._settings = settings
        self.window = settings.window
        self._margins: deque[list[float]] = deque(maxlen=settings.window)

    def observe(self, pairs: Sequence[Pair]) -> None:
        """Take the margins of a step's sampled pairs into account."""
        self._margins.append([pair.margin for pair in pairs if pair.source == "online"])

    def mark(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The step's pairs, observed, the uncertain ones with `label_noise` set."""
        self.observe(pairs)
        seen = list(itertools.chain.from_iterable(self._margins))
        if not seen:
            return list(pairs)
        threshold = float(np.quantile(seen, self._settings.quantile))
        noise = self._settings.label_smoothing
        return [
            replace(pair, label_noise=noise) if pair.source == "online" and pair.margin <= threshold else pair
            for pair in pairs
        ]


class _Judged:
    """A completion with its verdict and its final score."""

    def __init__(self, completion: Completion, judgement: Judgement, score: float):
        self.completion, self.judgement, self.score = completion, judgement, score


_Choice = Iterator[tuple[_Judged, _Judged]]


def _best_vs_worst(prompt: Prompt, judged: Sequence[_Judged], margin: float) -> _Choice:
    yield max(judged, key=_score), min(judged, key=_score)


def _best_vs_random_below(prompt: Prompt, judged: Sequence[_Judged], margin: float) -> _Choice:
    best = max(judged, key=_score)
    below = [one for one in judged if one.score <= best.score - margin]
    if below:
        drawn = random.Random("\n".join([prompt.id, *(one.completion.text for one in judged)]))
        yield best, drawn.choice(below)


def _all_pairs(prompt: Prompt, judged: Sequence[_Judged], margin: float) -> _Choice:
    distinct = {one.completion.text: one for one in judged}.values()
    yield from itertools.combinations(sorted(distinct, key=_score, reverse=True), 2)


def _best_vs_reference(prompt: Prompt, judged: Sequence[_Judged], margin: float) -> _Choice:
    sampled = [one for one in judged if one.completion.finish_reason != WRITTEN]
    references = [one for one in judged if one.completion.finish_reason == WRITTEN]
    if sampled and references:
        chosen, rejected = sorted([max(sampled, key=_score), references[0]], key=_score, reverse=True)
        yield chosen, rejected


_RULES = {
    "best_vs_worst": _best_vs_worst,
    "best_vs_random_below": _best_vs_random_below,
    "all_pairs": _all_pairs,
    "best_vs_reference": _best_vs_reference,
}


def _pair(prompt: Prompt, chosen: _Judged, rejected: _Judged) -> Pair:
    return Pair(
        prompt=prompt,
        completions=PairValues(chosen.completion, rejected.completion),
        judgements=PairValues(chosen.judgement, rejected.judgement),
        margin=chosen.score - rejected.score,
        source="online",
        policy_version=max(chosen.completion.policy_version, rejected.completion.policy_version),
    )


def _score(judged: _Judged) -> float:
    return judged.score
