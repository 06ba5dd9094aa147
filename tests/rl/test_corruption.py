"""Constructed wrong answers: wrong, plausible, and in the words of the world."""

import numpy as np
import pytest

from rl.types import Prompt
from rl.world.corruption import corrupted_answer
from rl.world.grading import grade_answer, is_correct
from rl.world.prompts import evaluation_prompts
from rl.world.scenes import COMPANIONS

PROMPTS = evaluation_prompts(60, seed=1)


@pytest.mark.parametrize("kind", ["describe", "presence", "count", "place", "copy", "sum"])
def test_a_corrupted_answer_is_wrong_and_well_formed(kind: str) -> None:
    rng = np.random.default_rng(0)
    prompts = [prompt for prompt in PROMPTS if (prompt.truth or {})["kind"] == kind]
    assert prompts
    for prompt in prompts:
        answer = corrupted_answer(prompt, rng)
        assert answer.endswith(".")
        if kind == "describe":
            attributes, _ = grade_answer(prompt.truth or {}, answer, finished=True)
            assert attributes.correctness < 4
            assert attributes.coherence == 4
        else:
            assert not is_correct(prompt.truth or {}, answer)


def test_an_added_object_is_a_usual_companion_where_there_is_one() -> None:
    prompt = Prompt.make([], truth={"kind": "describe", "objects": [["top left", "red circle"]]})
    rng = np.random.default_rng(0)
    answers = [corrupted_answer(prompt, rng) for _ in range(200)]
    added = [answer for answer in answers if answer.count("there is") == 2]
    assert len(added) > 60
    assert all(COMPANIONS["red circle"] in answer for answer in added)
