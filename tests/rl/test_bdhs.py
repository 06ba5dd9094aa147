"""BDHS: Algorithm 1 of arXiv 2407.02477, trap by trap."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from rl.bdhs import BdhsSettings, Continuation, cut, degrade, join, split_sentences, swap_yes_no
from rl.similarity import Similarity, lexical_similarity
from rl.types import Prompt
from tests.conftest import make_prompt

ANSWER = "Yes, it is red. The circle is 3.5 cm wide.\n\nIs it round? No doubt about it"
SENTENCES = ["Yes, it is red.", " The circle is 3.5 cm wide.", "\n\nIs it round?", " No doubt about it"]


class Scripted:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, say: Callable[[Continuation], str] = lambda asked: "something else."):
        self.say = say
        self.calls: list[list[Continuation]] = []

    async def __call__(self, asked: Sequence[Continuation]) -> list[str]:
        self.calls.append(list(asked))
        return [self.say(one) for one in asked]


def unlike(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    return [0.0] * len(texts)


def fixed(*values: float) -> Similarity:
    """Similarities that are told in advance, one per text and call."""
    left = list(values)
    return lambda texts, others: [left.pop(0) for _ in texts]


def run(
    model: Scripted,
    similarity: Similarity | None = None,
    answers: Sequence[str] = (ANSWER,),
    prompts: Sequence[Prompt] | None = None,
    seed: int = 0,
    **settings: object,
) -> tuple[list[str], dict[str, int]]:
    prompts = prompts or [make_prompt(f"Question {index}?") for index in range(len(answers))]
    return asyncio.run(degrade(prompts, answers, model, similarity or unlike, BdhsSettings(**settings), seed))  # type: ignore[arg-type]


def allowed_heads(sentence: str) -> set[str]:
    """All that may stay of a sentence, swapped or not, as a prefix shows it."""
    heads = set()
    for text in {sentence, swap_yes_no(sentence)}:
        body = text.lstrip()
        space = text[: len(text) - len(body)]
        words = body.split(" ")
        heads |= {(space + " ".join(words[:kept])).rstrip(" ") for kept in range(len(words))}
    return heads


def test_each_sentence_is_conditioned_on_the_true_sentences_before_it() -> None:
    for seed in range(20):
        model = Scripted()
        run(model, seed=seed)
        (asked,) = model.calls
        for index, one in enumerate(asked):
            before = "".join(SENTENCES[:index])
            assert one.prefix.startswith(before)
            assert one.prefix.removeprefix(before) in allowed_heads(SENTENCES[index])
            assert "something else" not in one.prefix


def test_no_prefix_ends_in_a_space() -> None:
    for seed in range(20):
        model = Scripted()
        run(model, seed=seed)
        assert not any(one.prefix.endswith(" ") for one in model.calls[0])


def test_every_sentence_is_cut_and_its_last_word_always_left_out() -> None:
    lengths = set()
    for seed in range(100):
        model = Scripted()
        run(model, seed=seed, answers=["The red circle stands alone."])
        (one,) = model.calls[0]
        assert one.to_sentence_end
        lengths.add(len(one.prefix.split()))
    assert lengths == {0, 1, 2, 3, 4}


def test_one_sight_is_shared_by_the_sentences_of_a_try_and_drawn_anew_for_the_next() -> None:
    model = Scripted()
    run(model, fixed(1, 1, 1, 1, 1), threshold=0.9, noise=100)
    sights = [{one.sight for one in call} for call in model.calls]
    assert [len(one) for one in sights] == [1] * 5
    assert len(set.union(*sights)) == 5
    assert all((one.threshold, one.noise) == (0.9, 100) for one in set.union(*sights))


def test_cuts_are_drawn_anew_for_each_try() -> None:
    model = Scripted()
    run(model, fixed(1, 1, 1, 1, 1))
    assert len({tuple(one.prefix for one in call) for call in model.calls[:4]}) > 1


def test_prompts_of_one_batch_have_different_sights() -> None:
    model = Scripted()
    run(model, answers=[ANSWER, ANSWER])
    assert len({one.sight for one in model.calls[0]}) == 2


def test_five_tries_are_four_guided_and_one_unguided_that_is_accepted_as_it_is() -> None:
    model = Scripted(lambda asked: "it is red." if asked.to_sentence_end else " A free answer. Two sentences. ")
    (degraded,), counts = run(model, fixed(1, 1, 1, 1, 1))
    assert [[one.to_sentence_end for one in call] for call in model.calls] == [[True] * 4] * 4 + [[False]]
    assert model.calls[-1][0].prefix == ""
    assert degraded == "A free answer. Two sentences."
    assert counts == {"bdhs": 1} | {f"similar_{attempt}": 1 for attempt in range(1, 6)}


def test_two_tries_are_one_guided_and_one_unguided() -> None:
    model = Scripted()
    run(model, fixed(1, 1), tries=2)
    assert [call[0].to_sentence_end for call in model.calls] == [True, False]


def test_a_single_try_is_guided_and_accepted_whatever_its_similarity() -> None:
    model = Scripted()
    (degraded,), counts = run(model, fixed(1), tries=1)
    assert all(one.to_sentence_end for one in model.calls[0])
    assert len(model.calls) == 1
    assert degraded.count("something else.") == 4
    assert counts == {"bdhs": 1, "similar_1": 1}


@pytest.mark.parametrize(("phi", "tries"), [(0.96999, 1), (0.97, 2), (0.98, 2)])
def test_an_answer_at_the_threshold_is_similar_and_tried_again(phi: float, tries: int) -> None:
    model = Scripted()
    run(model, fixed(phi, 0.1))
    assert len(model.calls) == tries


def test_the_similarity_is_taken_between_degraded_and_true_answers() -> None:
    seen = []

    def similarity(texts: Sequence[str], others: Sequence[str]) -> list[float]:
        seen.append((list(texts), list(others)))
        return [0.0] * len(texts)

    degraded, _ = run(Scripted(), similarity, answers=[ANSWER, "It is blue."])
    assert seen == [(degraded, [ANSWER, "It is blue."])]


def test_all_sentences_of_all_open_prompts_go_in_one_call_and_accepted_ones_are_left_alone() -> None:
    answers = ["One. Two.", "Three. Four. Five.", "Six."]
    model = Scripted(lambda asked: f"{len(model.calls)}.")
    #                                 three prompts  the first two  the second
    degraded, counts = run(model, fixed(0.99, 0.98, 0.2, 0.1, 0.99, 0.3), answers, tries=4)
    assert [len(call) for call in model.calls] == [6, 5, 3]
    assert [text[-2:] for text in degraded] == ["2.", "3.", "1."]
    assert counts == {"bdhs": 3, "similar_1": 2, "similar_2": 1, "similar_3": 0, "similar_4": 0}


def test_nothing_is_asked_for_no_prompts() -> None:
    model = Scripted()
    assert run(model, answers=[], tries=2) == ([], {"bdhs": 0, "similar_1": 0, "similar_2": 0})
    assert model.calls == []


def test_a_prompt_fares_the_same_whatever_its_batch_mates_and_its_place() -> None:
    def say(asked: Continuation) -> str:
        return f"{asked.sight.seed} {len(asked.prefix)}."

    prompts = [make_prompt(f"Question {index}?") for index in range(3)]
    answers = [ANSWER, "Yes. It is blue and it is small.", "No."]
    together, _ = run(Scripted(say), lexical_similarity, answers, prompts)
    turned, _ = run(Scripted(say), lexical_similarity, answers[::-1], prompts[::-1])
    alone = [run(Scripted(say), lexical_similarity, [a], [p])[0][0] for a, p in zip(answers, prompts, strict=True)]
    assert together == turned[::-1] == alone


def test_the_seed_settles_everything() -> None:
    models = [Scripted(), Scripted(), Scripted()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model, fixed(1, 1, 1, 1, 1), seed=seed)
    assert models[0].calls == models[1].calls
    assert models[0].calls != models[2].calls


def test_a_prompt_without_images_works_as_well() -> None:
    (degraded,), _ = run(Scripted(), prompts=[make_prompt(scene=None)])
    assert degraded.endswith("something else.")


def faithful(answer: str) -> Callable[[Continuation], str]:
    """Goes on as the true answer does, wherever it was cut, without its leading space."""

    def say(asked: Continuation) -> str:
        so_far = 0
        for sentence in split_sentences(answer):
            so_far += len(sentence)
            if so_far > len(asked.prefix) and answer.startswith(asked.prefix):
                return answer[len(asked.prefix) : so_far].strip()
        return answer.strip()

    return say


@pytest.mark.parametrize(
    "answer",
    [
        "It is red. The circle is 3.5 cm wide.\n\nIs it round? There is doubt",
        "A list:\n- red\n- blue. Done!",
        "\n It is red.   Wide spaces stay.",
        "Yellow.",
    ],
)
def test_a_model_that_says_the_same_gives_the_true_answer_back_to_the_letter(answer: str) -> None:
    for seed in range(30):
        (degraded,), _ = run(Scripted(faithful(answer)), seed=seed, answers=[answer])
        assert degraded == answer


def test_a_one_word_answer_is_written_anew_as_a_whole() -> None:
    model = Scripted(lambda asked: " no.")
    assert run(model, answers=["Yes."])[0] == ["no."]
    assert model.calls[0][0].prefix == ""


def test_yes_and_no_are_swapped_half_of_the_time() -> None:
    kept = []
    for seed in range(300):
        model = Scripted()
        run(model, seed=seed, answers=["Yes, there is."])
        kept.append(model.calls[0][0].prefix.split(",")[0])
    assert kept.count("Yes") == pytest.approx(100, abs=25)  # a third of the cuts fall before the word
    assert kept.count("No") == pytest.approx(100, abs=25)


def test_a_swapped_word_never_reaches_the_sentences_after_it() -> None:
    for seed in range(20):
        model = Scripted()
        run(model, seed=seed, answers=["Yes, there is. It is red."])
        assert model.calls[0][1].prefix.startswith("Yes, there is.")


def test_empty_tails_leave_no_loose_space() -> None:
    for seed in range(20):
        (degraded,), _ = run(Scripted(lambda asked: "  "), seed=seed, answers=["It is red. It is blue."])
        assert degraded == degraded.strip()
        assert "  " not in degraded


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_answer_without_words_does_no_harm(answer: str) -> None:
    (degraded,), _ = run(Scripted(), lexical_similarity, answers=[answer])
    assert degraded.strip() == "something else."


@pytest.mark.parametrize(
    ("sentence", "swapped"),
    [
        ("Yes, there is.", "No, there is."),
        ("No.", "Yes."),
        ("\n yes it is", "\n no it is"),
        (" no", " yes"),
    ],
)
def test_a_leading_yes_or_no_is_swapped_and_its_case_kept(sentence: str, swapped: str) -> None:
    assert swap_yes_no(sentence) == swapped
    assert swap_yes_no(swapped) == sentence


@pytest.mark.parametrize(
    "sentence", ["Not here.", "None.", "Now", "Yesterday it rained.", "No-one is there.", "nobody", "It says yes.", ""]
)
def test_other_words_and_places_are_not_swapped(sentence: str) -> None:
    assert swap_yes_no(sentence) == sentence


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (ANSWER, SENTENCES),
        ("Really?! Yes... it is", ["Really?!", " Yes...", " it is"]),
        ('He said "no." Then he left.', ['He said "no."', " Then he left."]),
        ("One.\n", ["One.\n"]),
        ("v1.2 is 3.5, at a.b", ["v1.2 is 3.5, at a.b"]),
        ("", []),
    ],
)
def test_sentences_end_at_marks_before_white_space_and_restore_the_text(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences
    assert "".join(sentences) == text


def test_a_cut_reaches_every_word_but_never_keeps_the_last() -> None:
    rng = np.random.default_rng(0)
    assert {cut(" A red circle.", rng) for _ in range(100)} == {" ", " A ", " A red "}
    assert cut("yes.", rng) == ""


@pytest.mark.parametrize(
    ("head", "tail", "joined"),
    [
        ("A red ", "circle.", "A red circle."),
        ("A red ", " circle. ", "A red circle."),
        ("A red ", ", round thing.", "A red, round thing."),
        ("A red ", " .", "A red."),
        ("It is ", "3.5 cm.", "It is 3.5 cm."),
        ("It is ", "(nearly) red.", "It is (nearly) red."),
        ("The dog", "'s tail.", "The dog's tail."),
        ("It says ", ' "stop".', 'It says "stop".'),
        ("Colours: ", "\n- red.", "Colours:\n- red."),
        ("Colours:\n", "- red.", "Colours:\n- red."),
        ("\n\n", " It is.", "\n\nIt is."),
        (" ", "It is.", " It is."),
        ("", " It is.", "It is."),
        ("A red ", "", "A red"),
        (" ", "", ""),
    ],
)
def test_head_and_tail_are_joined_with_the_space_that_belongs_there(head: str, tail: str, joined: str) -> None:
    assert join(head, tail) == joined


def test_the_defaults_are_the_papers() -> None:
    settings = BdhsSettings()
    assert (settings.threshold, settings.noise, settings.tries, settings.similar) == (0.99, 0, 5, 0.97)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.1}, {"noise": 1000}, {"tries": 0}, {"similar": -0.1}, {"sight": "x"}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BdhsSettings(**wrong)  # type: ignore[arg-type]
