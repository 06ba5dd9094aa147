"""A batch of pairs as scores: every row where it belongs, seen with its own picture."""

from dataclasses import replace

import pytest
import torch

from rl.extras import sequences, with_extras
from rl.pair_scoring import score_pairs, trust
from rl.policy import load_model, load_processor, resolve_model
from rl.render import written_completion
from rl.scoring import collate, token_logps
from rl.types import Extra, Pair, PairValues
from rl.world.prompts import evaluation_prompts
from tests.conftest import make_pair

BASE = resolve_model("rl/world/base")
CPU = torch.device("cpu")
ANSWERS = (("there is a red circle at the top left.", "yes."), ("no.", "there is a ring."), ("b c.", "b d c."))


@pytest.fixture(scope="module")
def model():
    return load_model(BASE, "float32")


@pytest.fixture(scope="module")
def processor():
    return load_processor(BASE)


@pytest.fixture(scope="module")
def pairs(processor) -> list[Pair]:
    """Answers of different lengths; the last prompt is without a picture, so that it has no corrupted extra."""
    prompts = [*evaluation_prompts(1, seed=2)[1:3], evaluation_prompts(1, seed=2)[-1]]
    made = []
    for prompt, texts in zip(prompts, ANSWERS, strict=True):
        sides = PairValues(*(written_completion(prompt, text, processor) for text in texts))
        made.append(replace(make_pair(prompt=prompt), completions=sides))
    return with_extras(made, {"corrupted", "mismatched"}, {}, processor, 128)


def alone(model, processor, sequence) -> list[float]:
    with torch.no_grad():
        return token_logps(model, collate([sequence], processor, False), CPU)[0, sequence.span].tolist()


def scored(model, processor, pairs, needs=frozenset({"corrupted", "mismatched"}), reference=None):
    with torch.no_grad():
        return score_pairs(pairs, model, processor, CPU, needs, reference)


def test_each_side_has_the_log_probs_of_its_own_tokens(model, processor, pairs: list[Pair]) -> None:
    scores = scored(model, processor, pairs)
    for index, pair in enumerate(pairs):
        for side, sequence in enumerate(sequences(pair)[:2]):
            length = len(sequence.token_ids)
            row, mask = scores.policy[side][index], scores.mask[side][index]
            assert row[:length].tolist() == pytest.approx(alone(model, processor, sequence), abs=1e-4)
            assert row[length:].abs().sum() == 0
            assert mask.tolist() == [1.0] * length + [0.0] * (len(mask) - length)


def test_extras_belong_to_their_pair_and_are_seen_as_what_they_are(model, processor, pairs: list[Pair]) -> None:
    scores = scored(model, processor, pairs)
    assert scores.extras["corrupted"].owner.tolist() == [0, 1]
    assert scores.extras["mismatched"].owner.tolist() == [0, 1, 2]
    for place, (role, owner) in enumerate([("corrupted", 0), ("corrupted", 1)]):
        sequence = sequences(pairs[owner])[2]
        row = scores.extras[role].policy[place][: len(sequence.token_ids)]
        assert row.tolist() == pytest.approx(alone(model, processor, sequence), abs=1e-4)
        assert row.tolist() != pytest.approx(scores.policy.chosen[owner][: len(row)].tolist(), abs=1e-2)


def test_a_role_that_is_needed_and_that_nobody_has_is_there_without_rows(model, processor, pairs: list[Pair]) -> None:
    bare = [replace(pair, extras=()) for pair in pairs]
    extras = scored(model, processor, bare, frozenset({"judged"})).extras
    assert list(extras) == ["judged"]
    assert len(extras["judged"].policy) == len(extras["judged"].owner) == 0


def test_the_reference_is_what_the_pairs_carry(model, processor, pairs: list[Pair]) -> None:
    assert scored(model, processor, pairs).reference is None
    carried = []
    for number, pair in enumerate(pairs, start=1):
        logps = PairValues(*((-0.1 * number,) * len(one.token_ids) for one in pair.completions))
        extras = tuple(Extra(one.role, one.completion, (-9.0,) * len(one.completion.token_ids)) for one in pair.extras)
        carried.append(replace(pair, reference_logps=logps, extras=extras))
    scores = scored(model, processor, carried)
    assert scores.reference is not None
    for index, pair in enumerate(pairs):
        length = len(pair.completions.rejected.token_ids)
        assert scores.reference.rejected[index].sum().item() == pytest.approx(-0.1 * (index + 1) * length)
    assert scores.extras["mismatched"].reference is not None
    assert scores.extras["mismatched"].reference.min() == -9


def test_a_reference_in_the_learner_sees_the_same_batch(model, processor, pairs: list[Pair]) -> None:
    needs = frozenset({"reference", "corrupted", "mismatched"})
    scores = scored(model, processor, pairs, needs, lambda batch: token_logps(model, batch, CPU))
    assert scores.ratios.chosen.abs().max() < 1e-5
    assert scores.extras["corrupted"].ratios.abs().max() < 1e-5


def test_changed_tokens_are_those_without_a_partner_in_the_other_answer(model, processor, pairs: list[Pair]) -> None:
    changed = scored(model, processor, pairs[2:], frozenset({"changed", "mismatched"})).changed
    assert changed is not None
    assert changed.chosen[0].tolist()[:4] == [0, 0, 0, 0], "b c . </s>"
    assert changed.rejected[0].tolist()[:5] == [0, 1, 0, 0, 0], "b d c . </s>"


def test_collision_is_the_probability_that_two_draws_agree(model, processor, pairs: list[Pair]) -> None:
    collision = scored(model, processor, pairs, frozenset({"collision", "corrupted", "mismatched"})).collision
    assert collision is not None
    sequence = sequences(pairs[2])[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])).logits
    expected = logits.softmax(-1).square().sum(-1).log()[0, sequence.span]
    assert collision.chosen[2][: len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_stale_pairs_count_as_much_as_the_policy_still_stands_by_them(model, processor, pairs: list[Pair]) -> None:
    scores = scored(model, processor, pairs)

    def sampled(pair: Pair, index: int, chosen: float, rejected: float) -> Pair:
        """Each token sampled at the policy's own log-prob plus so many nats."""
        sides = []
        for side, more in enumerate((chosen, rejected)):
            completion = pair.completions[side]
            logps = scores.policy[side][index][: len(completion.token_ids)] + more
            sides.append(replace(completion, logps=tuple(logps.tolist())))
        return replace(pair, completions=PairValues(*sides))

    likelier_then = sampled(pairs[0], 0, 0.5, 0.25)
    likelier_now = sampled(pairs[1], 1, -2.0, 0.0)
    factors = trust([likelier_then, likelier_now, pairs[2]], scores, [True, True, True])
    expected = [float(torch.tensor(-0.75).exp()), 1.0, 1.0]
    assert factors.tolist() == pytest.approx(expected, rel=1e-4), "never above 1, and 1 where nobody sampled"
    assert trust([likelier_then, likelier_now, pairs[2]], scores, [False] * 3).tolist() == [1.0] * 3
