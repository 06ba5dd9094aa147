"""What each regime makes of prompts and stored pairs."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import DataError
from rl.judges.oracle import OracleJudge
from rl.pairs import PairSettings
from rl.policy import load_processor, resolve_model
from rl.regimes import (
    AveragedPairs,
    ConstructedPairs,
    IterativePairs,
    MixedPairs,
    PovidPairs,
    Tools,
    make_regime,
    parts,
)
from rl.render import written_completion
from rl.rollout import Rollouts, SamplingSettings
from rl.stored import OfflinePairs
from rl.types import Completion, Pair, PairValues, Prompt
from rl.world.prompts import training_prompts
from tests.conftest import make_pair

PROMPTS = training_prompts(40, language_share=0.0, seed=0)
PROCESSOR = load_processor(resolve_model("rl/world/base"))
SAMPLED = PairSettings(margin=1)
STORED = OfflinePairs(path="unused")
CONSTRUCTED = ConstructedPairs(kind="constructed")


class Scripted(Rollouts):
    """Answers every prompt rightly once and wrongly once."""

    def __init__(self) -> None:
        super().__init__([])
        self.version = 7
        self.asked: list[str] = []

    async def generate(self, prompts: Sequence[Prompt], sampling: Any, seed: int) -> list[list[Completion]]:
        self.asked += [prompt.id for prompt in prompts]
        return [
            [written_completion(prompt, text, PROCESSOR) for text in (prompt.reference_answer or "", "not.")]
            for prompt in prompts
        ]

    async def distort(self, prompts: Sequence[Prompt], answers: Any, noise: int, seed: int) -> list[tuple[int, ...]]:
        return [answer[1:] if index else answer for index, answer in enumerate(answers)]


def tools() -> Tools:
    return Tools(Scripted(), OracleJudge(), PROCESSOR, SamplingSettings(), 128, asyncio.Lock())


def stored_pairs(prompts: Sequence[Prompt] = PROMPTS) -> list[Pair]:
    def sides(prompt: Prompt) -> PairValues[Completion]:
        texts = (prompt.reference_answer or "", "stored and wrong.")
        return PairValues(*(written_completion(prompt, text, PROCESSOR) for text in texts))

    return [replace(make_pair(prompt=one), completions=sides(one), source="offline") for one in prompts]


def take(settings: Any, count: int, used: Tools, prompts: Sequence[Prompt] = PROMPTS) -> list[Pair]:
    regime = make_regime(settings, prompts, stored_pairs(prompts), seed=0)
    return asyncio.run(regime.pairs(count, used, seed=5))


def test_offline_pairs_come_as_they_are_and_nothing_is_sampled() -> None:
    used = tools()
    pairs = take(STORED, 8, used)
    assert len(pairs) == 8
    assert used.rollouts.asked == []  # type: ignore[attr-defined]
    assert used.counts["pairs"] == 8
    assert not parts(STORED).needs_engines


def test_online_pairs_are_the_judges_choice_among_samples() -> None:
    used = tools()
    pairs = take(SAMPLED, 8, used)
    assert {pair.source for pair in pairs} == {"online"}
    assert all(pair.completions.chosen.text == pair.prompt.reference_answer for pair in pairs)
    assert used.counts["prompts"] == 8
    assert set(used.samples) == set(used.rollouts.asked)  # type: ignore[attr-defined]


def test_mixed_takes_each_stored_pair_or_a_sampled_one_of_the_same_prompt() -> None:
    used = tools()
    pairs = take(MixedPairs(kind="mixed", stored=STORED, sampled=SAMPLED), 40, used)
    by_source = {source: [p.prompt.id for p in pairs if p.source == source] for source in ("offline", "online")}
    assert not set(by_source["offline"]) & set(by_source["online"])
    assert sorted(by_source["offline"] + by_source["online"]) == sorted(prompt.id for prompt in PROMPTS)
    assert 10 <= len(by_source["offline"]) <= 30, "about half of them"
    assert sorted(used.rollouts.asked) == sorted(by_source["online"])  # type: ignore[attr-defined]


def test_averaged_gives_two_pairs_of_one_chosen_whose_weights_add_up_to_one() -> None:
    settings = AveragedPairs(kind="averaged", stored=STORED, second=CONSTRUCTED, stored_weight=0.3)
    pairs = take(settings, 10, tools())
    assert len(pairs) == 20
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert first.prompt.id == second.prompt.id
        assert second.completions.chosen.text == first.completions.chosen.text
        assert second.completions.rejected.text != first.completions.rejected.text
        assert (first.weight, second.weight) == (0.3, 0.7)
        assert (first.source, second.source) == ("offline", "constructed")


def test_where_the_second_answer_comes_out_the_same_the_stored_pair_counts_alone() -> None:
    settings = AveragedPairs(kind="averaged", stored=STORED, second=PovidPairs(kind="povid"))
    used = tools()
    pairs = take(settings, 4, used)
    assert sorted(pair.weight for pair in pairs) == [0.5] * 6 + [1.0]
    assert used.counts["identical"] == 1


def test_two_stored_pairs_of_one_prompt_both_get_a_second() -> None:
    settings = AveragedPairs(kind="averaged", stored=STORED, second=CONSTRUCTED)
    regime = make_regime(settings, (), stored_pairs(PROMPTS[:1]) * 2, seed=0)
    assert [pair.weight for pair in asyncio.run(regime.pairs(2, tools(), seed=1))] == [0.5] * 4


def test_a_made_answer_that_is_too_long_makes_no_pair() -> None:
    used = tools()
    used.max_length = 30
    prompts = [prompt for prompt in PROMPTS if len(prompt.reference_answer or "") > 60]
    assert prompts
    assert take(CONSTRUCTED, len(prompts), used, prompts) == []
    assert used.counts["too_long"] == len(prompts)


def test_self_made_pairs_carry_the_version_that_made_them() -> None:
    pairs = take(PovidPairs(kind="povid"), 4, tools())
    assert [(pair.source, pair.policy_version) for pair in pairs] == [("povid", 7)] * 3


def test_prompts_without_an_answer_are_refused_where_pairs_are_made_of_answers() -> None:
    bare = [*PROMPTS[:3], replace(PROMPTS[3], reference_answer=None)]
    with pytest.raises(DataError, match=f"prompt {PROMPTS[3].id} has no reference answer, of which pairs.kind povid"):
        take(PovidPairs(kind="povid"), 1, tools(), bare)


def test_constructed_pairs_need_the_truth() -> None:
    bare = [replace(PROMPTS[0], truth=None)]
    with pytest.raises(DataError, match="is not of the tiny world"):
        take(CONSTRUCTED, 1, tools(), bare)


def test_a_position_is_gone_on_from() -> None:
    used = tools()
    whole = make_regime(STORED, (), stored_pairs(), seed=3)
    first, second = (asyncio.run(whole.pairs(6, used, seed=0)) for _ in range(2))
    again = make_regime(STORED, (), stored_pairs(), seed=3)
    again.stream.position = 6
    assert asyncio.run(again.pairs(6, used, seed=0)) == second
    assert first != second


def test_later_epochs_of_a_round_deal_out_the_pairs_of_its_first_anew() -> None:
    rounds = IterativePairs(kind="iterative", steps_per_round=2, epochs=3)
    assert rounds.round_steps == 6
    assert [rounds.first_step_of(step) for step in range(1, 10)] == [None, None, 1, 1, 1, 1, None, None, 7]
    pairs = stored_pairs(PROMPTS[:7])
    epochs = [[one for step in steps for one in rounds.replayed(pairs, step, seed=0)] for steps in ((3, 4), (5, 6))]
    for epoch in epochs:
        assert sorted(one.prompt.id for one in epoch) == sorted(one.prompt.id for one in pairs), "each pair once"
    assert epochs[0] != epochs[1]
    assert len(rounds.replayed(pairs, 3, seed=0)) == 4


def test_stored_pairs_without_truth_have_no_constructed_second() -> None:
    settings = AveragedPairs(kind="averaged", stored=STORED, second=CONSTRUCTED)
    bare = [replace(pair, prompt=replace(pair.prompt, truth=None)) for pair in stored_pairs(PROMPTS[:1])]
    with pytest.raises(DataError, match="is not of the tiny world"):
        make_regime(settings, (), bare, seed=0)
