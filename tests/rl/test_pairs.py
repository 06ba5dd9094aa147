"""Pairs: what makes one, what makes none, and that everything is counted."""

import pytest

from rl.pairs import PairSettings, make_pairs
from tests.conftest import make_completion, make_judgement, make_prompt


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
