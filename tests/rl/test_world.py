"""The tiny world: deterministic, splits apart, truth exact."""

import itertools

import numpy as np
import pytest

from rl.evaluation import Answer, BaseAnswer, measure
from rl.world.grading import grade_answer, hallucinated, is_correct, mentions, says_yes
from rl.world.prompts import evaluation_prompts, training_prompts
from rl.world.questions import LANGUAGE_TASKS, ask_language, ask_presence, describe
from rl.world.scenes import CLASSES, COMPANIONS, distinct_scenes, render
from rl.world.training_text import training_examples
from tests.conftest import SCENE, make_completion, make_judgement, make_prompt

DESCRIBE = {"kind": "describe", "objects": [list(one) for one in SCENE.objects]}


def test_the_same_seed_draws_the_same_world() -> None:
    assert distinct_scenes("train", 1, 50) == distinct_scenes("train", 1, 50)
    assert distinct_scenes("train", 1, 50) != distinct_scenes("train", 2, 50)
    assert np.array_equal(np.asarray(render(SCENE)), np.asarray(render(SCENE)))


def test_no_scene_is_in_two_splits() -> None:
    splits = [set(distinct_scenes(split, 0, 300)) for split in ("train", "validation", "heldout")]
    assert all(not a & b for a, b in itertools.combinations(splits, 2))
    assert all(scene.split == "heldout" for scene in splits[2])


def test_held_out_prompts_show_no_training_picture() -> None:
    seen = {image.digest for prompt in training_prompts(200, 0.2, seed=0) for image in prompt.images}
    held = {image.digest for prompt in evaluation_prompts(50, seed=0) for image in prompt.images}
    assert not seen & held


def test_training_text_is_the_same_for_the_same_seed_and_biased_towards_companions() -> None:
    first = [answer for _, answer in itertools.islice(training_examples(0), 300)]
    assert first == [answer for _, answer in itertools.islice(training_examples(0), 300)]
    biased = total = 0
    for prompt, answer in itertools.islice(training_examples(0), 3000):
        truth = prompt.truth or {}
        if truth["kind"] == "describe":
            total += 1
            wrong = hallucinated(answer, truth)
            biased += bool(wrong)
            assert all(name in COMPANIONS.values() for name in wrong)
    assert 0.15 < biased / total < 0.45


def test_pope_asks_yes_and_no_equally_often_over_all_negatives() -> None:
    questions = [p.truth for p in evaluation_prompts(60, seed=0) if p.truth and p.truth["kind"] == "presence"]
    for negatives in ("random", "popular", "adversarial"):
        answers = [q["answer"] for q in questions if q["negatives"] == negatives]
        assert answers.count("yes") == answers.count("no") == 20


def test_adversarial_negatives_are_usual_companions() -> None:
    rng = np.random.default_rng(0)
    question = ask_presence(SCENE, rng, present=False, negatives="adversarial")
    assert question.truth["object"] == COMPANIONS["red circle"]


@pytest.mark.parametrize("task", LANGUAGE_TASKS)
def test_language_tasks_know_their_answers(task: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        question = ask_language(task, rng)
        words = question.text.rstrip("?").split()
        expected = {
            "copy": " ".join(words[1:]),
            "reverse": " ".join(words[:0:-1]),
            "sort": " ".join(sorted(words[1:])),
            "sum": str(sum(int(word) for word in words if word.isdigit())),
        }[task]
        assert question.truth["answer"] == expected
        assert is_correct(question.truth, question.answer)


def test_a_true_description_gets_full_marks() -> None:
    attributes, reason = grade_answer(DESCRIBE, describe(DESCRIBE["objects"]), finished=True)
    assert attributes[:3] == (4, 4, 4)
    assert "everything named is there" in reason


def test_an_invented_object_costs_correctness_and_is_named() -> None:
    text = describe([*DESCRIBE["objects"], ["top right", "blue square"]])
    attributes, reason = grade_answer(DESCRIBE, text, finished=True)
    assert attributes[:3] == (4, 2, 4)
    assert "not there: blue square" in reason


def test_a_misplaced_object_costs_less_than_an_invented_one() -> None:
    attributes, reason = grade_answer(DESCRIBE, describe([["top right", "red circle"], DESCRIBE["objects"][1]]), True)
    assert attributes.correctness == 3
    assert "misplaced: red circle" in reason


def test_leaving_out_an_object_costs_helpfulness() -> None:
    attributes, reason = grade_answer(DESCRIBE, describe(DESCRIBE["objects"][:1]), True)
    assert attributes[:3] == (2, 4, 4)
    assert "left out: green cross" in reason


@pytest.mark.parametrize("text", ["", "circle circle at", "there is a red"])
def test_gibberish_gets_no_credit_for_correctness(text: str) -> None:
    assert grade_answer(DESCRIBE, text, True)[0].correctness == 0


def test_repetition_and_a_cut_answer_cost_coherence() -> None:
    text = describe([DESCRIBE["objects"][0]] * 3)
    assert grade_answer(DESCRIBE, text, True)[0].coherence == 2
    assert grade_answer(DESCRIBE, text, False)[0].coherence == 0


def test_mentions_are_found_with_their_places() -> None:
    assert [tuple(m) for m in mentions("There is a Red circle at the top left. a blue ring")] == [
        ("red circle", "top left"),
        ("blue ring", None),
    ]


@pytest.mark.parametrize(
    ("text", "yes"), [("yes.", True), ("no.", False), ("there is not.", False), ("a ring. no.", True), ("", True)]
)
def test_pope_reads_the_first_sentence(text: str, yes: bool) -> None:
    assert says_yes(text) == yes


def answer(truth: dict, text: str, score: float | None = 1.0) -> Answer:
    return Answer(make_prompt(f"{truth} {text}", truth=truth), make_completion(text), make_judgement(score))


def test_metrics_match_a_count_by_hand() -> None:
    invented = describe([*DESCRIBE["objects"][:1], ["top right", "blue square"]])
    yes = {"kind": "presence", "answer": "yes", "negatives": "random"}
    no = {"kind": "presence", "answer": "no", "negatives": "popular"}
    answers = [
        answer(DESCRIBE, describe(DESCRIBE["objects"])),
        answer(DESCRIBE, invented),
        answer(yes, "yes."),
        answer(yes, "no."),
        answer(no, "yes."),
        answer(no, "no."),
        answer({"kind": "sum", "answer": "7"}, "7."),
        answer({"kind": "copy", "answer": "b c"}, "c b."),
    ]
    metrics = measure(answers, {})
    assert metrics["chair_s"] == 0.5
    assert metrics["chair_i"] == 0.25
    assert metrics["object_recall"] == 0.75
    assert metrics["pope_accuracy"] == metrics["pope_f1"] == metrics["pope_yes"] == 0.5
    assert metrics["pope_random_recall"] == 0.5
    assert metrics["language_accuracy"] == 0.5


def test_win_rate_counts_ties_half_and_leaves_out_abstentions() -> None:
    answers = [answer({"kind": "open"}, str(index), score) for index, score in enumerate([5, 5, 5, None])]
    ids = [one.prompt.id for one in answers]

    def base(*scores: float | None) -> dict[str, BaseAnswer]:
        return {id: BaseAnswer(make_completion("another."), one) for id, one in zip(ids, scores, strict=True)}

    assert measure(answers, base(4, 5, 6, 1))["win_rate"] == 0.5
    assert measure(answers, base(4, 5, None, 1))["win_rate"] == 0.75
    assert "win_rate" not in measure(answers, {})


def test_the_same_answer_is_half_a_win_whatever_a_noisy_judge_says() -> None:
    one = answer({"kind": "open"}, "the same.", 9)
    base = {one.prompt.id: BaseAnswer(make_completion("the same."), 2)}
    assert measure([one], base)["win_rate"] == 0.5


def test_scores_that_cannot_be_compared_are_not_averaged() -> None:
    metrics = measure([answer({"kind": "open"}, "an answer.", 9)], {}, absolute=False)
    assert "judge_score" not in metrics


def test_every_class_can_be_drawn_apart() -> None:
    from rl.world.scenes import Scene

    pictures = {np.asarray(render(Scene((("top left", name),)))).tobytes() for name in CLASSES}
    assert len(pictures) == len(CLASSES)
