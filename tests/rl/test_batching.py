"""Micro-batches: nothing lost, nothing twice, budget kept, ranks in step."""

import random

import pytest

from rl.batching import plan_microbatches


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_every_item_is_in_exactly_one_pass_and_ranks_have_equally_many(count: int, ranks: int) -> None:
    lengths = [random.Random(count).randint(5, 200) for _ in range(count)]
    plan = plan_microbatches(lengths, ranks, 400)
    assert sorted(index for rank in plan for group in rank for index in group) == list(range(count))
    assert len({len(rank) for rank in plan}) == 1


def test_padded_tokens_stay_within_the_budget() -> None:
    lengths = [random.Random(1).randint(5, 200) for _ in range(100)]
    for rank in plan_microbatches(lengths, 2, 1000):
        for group in rank:
            assert len(group) * max((lengths[index] for index in group), default=0) <= 1000


def test_an_item_over_the_budget_gets_a_pass_of_its_own() -> None:
    assert plan_microbatches([5000, 10], 1, 1000) == [[[0], [1]]]


def test_neighbours_in_a_pass_are_of_like_length() -> None:
    (passes,) = plan_microbatches([10, 100, 10, 100], 1, 200)
    assert sorted(map(sorted, passes)) == [[0, 2], [1, 3]]


def test_a_rank_without_items_still_takes_part() -> None:
    assert plan_microbatches([7], 3, 100) == [[[0]], [[]], [[]]]
