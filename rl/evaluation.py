"""What an evaluation measures: judge scores, win rate against the base, and with ground truth CHAIR, POPE, language."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from rl.types import Completion, Judgement, Prompt
from rl.world.grading import hallucinated, is_correct, mentions, says_yes
from rl.world.questions import LANGUAGE_TASKS, NEGATIVES


@dataclass(frozen=True)
class Answer:
    """One held-out prompt with the policy's greedy answer and the verdict on it."""

    prompt: Prompt
    completion: Completion
    judgement: Judgement


class BaseAnswer(NamedTuple):
    """What the base said to a prompt, and its score."""

    completion: Completion
    score: float | None


def stored_answers(evaluation: Mapping[str, Any]) -> dict[str, BaseAnswer]:
    """The answers of a stored evaluation, as text without tokens, by prompt id."""
    return {
        row["prompt_id"]: BaseAnswer(
            Completion(row["prompt_id"], (), (), row["answer"], (), evaluation["version"], "stop"),
            row["judgement"]["score"],
        )
        for row in evaluation["answers"]
    }


def measure(answers: Sequence[Answer], base: Mapping[str, BaseAnswer], absolute: bool = True) -> dict[str, float]:
    """All metrics that the answers allow; rates are fractions. `base` has the base's answers by prompt id.

    Without ground truth in the prompts only `judge_score` (where scores of different prompts can be averaged, which
    `absolute` says), `win_rate` (where the base is known) and `mean_length` are given.
    """
    by_kind: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_kind[(answer.prompt.truth or {}).get("kind", "open")].append(answer)
    scores = [answer.judgement.score for answer in answers if answer.judgement.score is not None]
    metrics = {"mean_length": fmean(len(answer.completion.token_ids) for answer in answers)}
    if scores and absolute:
        metrics["judge_score"] = fmean(scores)
    if (rate := win_rate(answers, base)) is not None:
        metrics["win_rate"] = rate
    if by_kind["describe"]:
        metrics |= chair(by_kind["describe"])
    if by_kind["presence"]:
        metrics |= pope(by_kind["presence"])
    for kind in ("count", "place"):
        if by_kind[kind]:
            metrics[f"{kind}_accuracy"] = _accuracy(by_kind[kind])
    if language := [answer for task in LANGUAGE_TASKS for answer in by_kind[task]]:
        metrics["language_accuracy"] = _accuracy(language)
    return metrics


def win_rate(answers: Sequence[Answer], base: Mapping[str, BaseAnswer]) -> float | None:
    """Share of prompts on which the judge scores the answer above the base's; the same answer, like a tie, is half a
    win. None if no prompt can be compared."""
    wins = []
    for answer in answers:
        before, score = base.get(answer.prompt.id), answer.judgement.score
        if before is None:
            continue
        if before.completion.text == answer.completion.text:
            wins.append(0.5)
        elif score is not None and before.score is not None:
            wins.append(1.0 if score > before.score else 0.5 if score == before.score else 0.0)
    return fmean(wins) if wins else None


def chair(descriptions: Sequence[Answer]) -> dict[str, float]:
    """CHAIR per sentence (here: per description) and per object, and object recall (Rohrbach et al. 2018)."""
    named = invented = found = there = 0
    with_invented = 0
    length = 0
    for answer in descriptions:
        truth = answer.prompt.truth or {}
        wrong = hallucinated(answer.completion.text, truth)
        names = [mention.name for mention in mentions(answer.completion.text)]
        present = {name for _, name in truth["objects"]}
        named += len(names)
        invented += len(wrong)
        with_invented += bool(wrong)
        found += len(present & set(names))
        there += len(present)
        length += len(answer.completion.token_ids)
    return {
        "chair_s": with_invented / len(descriptions),
        "chair_i": invented / max(1, named),
        "object_recall": found / there,
        "description_length": length / len(descriptions),
    }


def pope(answers: Sequence[Answer]) -> dict[str, float]:
    """POPE accuracy, precision, recall, F1 and share of yes, over all and per kind of negatives (Li et al. 2023)."""
    metrics = _binary(answers, "pope")
    for negatives in NEGATIVES:
        part = [answer for answer in answers if (answer.prompt.truth or {})["negatives"] == negatives]
        if part:
            metrics |= _binary(part, f"pope_{negatives}")
    return metrics


def _binary(answers: Sequence[Answer], prefix: str) -> dict[str, float]:
    said = [says_yes(answer.completion.text) for answer in answers]
    true = [(answer.prompt.truth or {})["answer"] == "yes" for answer in answers]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision = hits / max(1, sum(said))
    recall = hits / max(1, sum(true))
    return {
        f"{prefix}_accuracy": fmean(s == t for s, t in zip(said, true, strict=True)),
        f"{prefix}_precision": precision,
        f"{prefix}_recall": recall,
        f"{prefix}_f1": 2 * precision * recall / max(1e-9, precision + recall),
        f"{prefix}_yes": fmean(said),
    }


def _accuracy(answers: Sequence[Answer]) -> float:
    return fmean(is_correct(answer.prompt.truth or {}, answer.completion.text) for answer in answers)
