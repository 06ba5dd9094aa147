"""Pairs: what makes one, what makes none, and that everything is counted."""

import dataclasses

import pytest

from rl.pairs import AttributeWeights, PairSettings, UncertainPairs, UncertainSettings, final_score, make_pairs
from rl.types import WRITTEN, Attributes, Judgement
from tests.conftest import make_completion, make_judgement, make_pair, make_prompt


def build(texts: list[str], scores: list[float | None], margin: float = 2):
    completions = [make_completion(text, version=3) for text in texts]
    return make_pairs(
        [make_prompt()], [completions], [[make_judgement(score) for score in scores]], PairSettings(margin=margin)
    )


def test_best_is_chosen_and_worst_rejected() -> None:
    (pair,), counts = build(["a", "b", "c"], [5, 12, 1])
    assert [one.text for one in pair.completions] == ["b", "c"]
    assert pair.margin == 11
    assert pair.policy_version == 3
    assert counts["pairs"] == 1


def test_scores_closer_than_the_margin_are_a_tie() -> None:
    pairs, counts = build(["a", "b"], [5, 6.5])
    assert pairs == []
    assert counts["ties"] == 1


def test_the_margin_itself_is_enough() -> None:
    assert build(["a", "b"], [5, 7])[1]["pairs"] == 1


def test_abstentions_never_become_pairs() -> None:
    (pair,), counts = build(["a", "b", "c"], [None, 9, 3])
    assert [one.text for one in pair.completions] == ["b", "c"]
    assert counts["abstentions"] == 1


@pytest.mark.parametrize("scores", [[None, None], [None, 9]])
def test_fewer_than_two_judged_answers_make_no_pair(scores: list[float | None]) -> None:
    pairs, counts = build(["a", "b"], scores)
    assert pairs == []
    assert counts["unjudged"] == 1


def test_identical_texts_make_no_pair_whatever_their_scores() -> None:
    pairs, counts = build(["a", "a"], [9, 1])
    assert pairs == []
    assert counts["identical"] == 1


def test_every_prompt_is_counted_once() -> None:
    outcomes = [
        build(t, s)[1] for t, s in ((["a", "b"], [9, 1]), (["a", "b"], [9, 9]), (["a", "a"], [1, 1]), (["a"], [1]))
    ]
    assert all(c["pairs"] + c["ties"] + c["identical"] + c["unjudged"] == 1 for c in outcomes)


def build_by(rule: str, scores: list[float], **more: object):
    completions = [make_completion(f"answer {index}") for index in range(len(scores))]
    return make_pairs(
        [make_prompt()],
        [completions],
        [[make_judgement(score) for score in scores]],
        PairSettings(rule=rule, **more),  # type: ignore[arg-type]
    )


def test_random_below_draws_among_those_a_margin_lower_and_always_the_same() -> None:
    drawn = set()
    for worse in range(40):
        pairs, _ = build_by("best_vs_random_below", [9, 8, 7, 2, worse / 100], margin=2)
        assert pairs[0].completions.chosen.text == "answer 0"
        drawn.add(pairs[0].completions.rejected.text)
    assert drawn <= {"answer 2", "answer 3", "answer 4"}
    one, same = (build_by("best_vs_random_below", [9, 8, 7, 2, 1])[0] for _ in range(2))
    assert one == same


def test_random_below_reaches_every_allowed_answer() -> None:
    groups = [[make_completion(f"{number} {index}") for index in range(4)] for number in range(30)]
    scores = [[make_judgement(score) for score in (9, 8, 5, 1)] for _ in groups]
    settings = PairSettings(rule="best_vs_random_below", margin=2)
    pairs, _ = make_pairs([make_prompt(str(n)) for n in range(30)], groups, scores, settings)
    assert {pair.completions.rejected.text[-1] for pair in pairs} == {"2", "3"}


def test_all_pairs_takes_every_two_that_far_apart() -> None:
    pairs, counts = build_by("all_pairs", [9, 8, 5], margin=3)
    assert [tuple(one.text for one in pair.completions) for pair in pairs] == [
        ("answer 0", "answer 2"), ("answer 1", "answer 2"),
    ]  # fmt: skip
    assert counts["pairs"] == 2


@pytest.mark.parametrize(("reference_score", "chosen"), [(12, "written"), (1, "answer")])
def test_the_reference_answer_is_chosen_only_if_the_judge_prefers_it(reference_score: float, chosen: str) -> None:
    written = dataclasses.replace(make_completion("written"), finish_reason=WRITTEN)
    group = [make_completion("answer"), make_completion("poor"), written]
    verdicts = [make_judgement(score) for score in (8, 0, reference_score)]
    (pair,), _ = make_pairs([make_prompt()], [group], [verdicts], PairSettings(rule="best_vs_reference"))
    assert pair.completions.chosen.text == chosen
    assert {one.text for one in pair.completions} == {"answer", "written"}


def test_a_score_is_the_weighted_sum_of_attributes() -> None:
    verdict = Judgement(9, Attributes(4, 3, 2, 1, 0), "", "test", "")
    assert final_score(make_completion(), verdict, PairSettings()) == 9
    weights = AttributeWeights(helpfulness=0, correctness=2, coherence=0, verbosity=-1, complexity=10)
    assert final_score(make_completion(), verdict, PairSettings(weights=weights)) == 16


def test_the_length_penalty_counts_tokens() -> None:
    long = make_completion(tokens=(1,) * 50)
    assert final_score(long, make_judgement(9), PairSettings(length_penalty=4)) == 7


def test_the_least_certain_pairs_are_marked_over_a_window() -> None:
    refine = UncertainPairs(UncertainSettings(quantile=0.25, label_smoothing=0.2, window=2))
    first = refine.mark([dataclasses.replace(make_pair(), margin=margin) for margin in (1.0, 5.0, 6.0, 7.0)])
    assert [pair.label_noise for pair in first] == [0.2, 0, 0, 0]
    later = refine.mark([dataclasses.replace(make_pair(), margin=margin) for margin in (8.0, 9.0, 10.0, 11.0)])
    assert [pair.label_noise for pair in later] == [0, 0, 0, 0]
