"""What is scored beside a pair, and which sequence each of it is."""

from dataclasses import replace

import pytest

from rl.extras import corrupted, sequences, with_extras
from rl.policy import load_processor, resolve_model
from rl.render import written_completion
from rl.types import ExtraRole, Pair, PairValues
from tests.conftest import make_completion, make_pair, make_prompt


@pytest.fixture(scope="module")
def processor():
    return load_processor(resolve_model("rl/world/base"))


def written_pair(processor, text: str, **prompt: object) -> Pair:
    asked = make_prompt(text, **prompt)
    sides = PairValues(*(written_completion(asked, answer, processor) for answer in ("yes.", "no.")))
    return replace(make_pair(prompt=asked), completions=sides)


def extras_of(processor, roles: set[ExtraRole], *pairs: Pair, max_length: int = 128, **samples: object) -> list[Pair]:
    return with_extras(pairs, roles, samples, processor, max_length)  # type: ignore[arg-type]


def test_without_a_role_a_pair_has_two_sequences(processor) -> None:
    (pair,) = extras_of(processor, set(), written_pair(processor, "Is there a red circle?"))
    assert [one.token_ids for one in sequences(pair)] == [one.token_ids for one in pair.completions]


def test_the_corrupted_extra_is_the_chosen_answer_under_a_small_crop(processor) -> None:
    (pair,) = extras_of(processor, {"corrupted"}, written_pair(processor, "Is there a red circle?"))
    chosen, _, extra = sequences(pair)
    assert (extra.prompt_token_ids, extra.token_ids) == (chosen.prompt_token_ids, chosen.token_ids)
    assert extra.images == (corrupted(chosen.images[0]),)
    assert extra.images[0].digest != chosen.images[0].digest
    assert (extra.images[0].width, extra.images[0].height) == (chosen.images[0].width, chosen.images[0].height)


def test_a_prompt_without_an_image_has_no_corrupted_extra(processor) -> None:
    (pair,) = extras_of(processor, {"corrupted"}, written_pair(processor, "Copy: b c", scene=None))
    assert pair.extras == ()


def test_the_mismatched_extra_is_another_pairs_chosen_answer_behind_this_prompt(processor) -> None:
    first, second = written_pair(processor, "Is there a red circle?"), written_pair(processor, "What do you see?")
    second = replace(
        second, completions=second.completions._replace(chosen=written_completion(second.prompt, "a ring.", processor))
    )
    one, two = extras_of(processor, {"mismatched"}, first, second)
    assert sequences(one)[2].token_ids == second.completions.chosen.token_ids
    assert sequences(one)[2].prompt_token_ids == first.completions.chosen.prompt_token_ids
    assert sequences(two)[2].token_ids == first.completions.chosen.token_ids
    twins = extras_of(processor, {"mismatched"}, first, first, second)
    assert all(sequences(twin)[2].token_ids == second.completions.chosen.token_ids for twin in twins[:2])
    (alone,) = extras_of(processor, {"mismatched"}, first)
    assert alone.extras == (), "a pair alone has no other to be mismatched with"


def test_samples_are_the_policys_other_answers_to_the_prompt(processor) -> None:
    pair = written_pair(processor, "Is there a red circle?")
    group = [*pair.completions, make_completion("maybe.", (9, 2))]
    (with_samples,) = extras_of(processor, {"sample"}, pair, **{pair.prompt.id: group})
    assert [extra.completion.text for extra in with_samples.extras] == ["maybe."]


def test_the_judged_extra_is_the_rejected_answer_behind_prompt_and_judgement(processor) -> None:
    pair = written_pair(processor, "Is there a red circle?")
    (judged,) = extras_of(processor, {"judged"}, pair)
    _, rejected, extra = sequences(judged)
    assert extra.token_ids == rejected.token_ids
    assert len(extra.prompt_token_ids) > len(rejected.prompt_token_ids)


def test_extras_that_are_too_long_are_left_out(processor) -> None:
    pair = written_pair(processor, "Is there a red circle?")
    length = max(map(len, sequences(pair)))
    (judged,) = extras_of(processor, {"judged", "corrupted"}, pair, max_length=length)
    assert [extra.role for extra in judged.extras] == ["corrupted"]
