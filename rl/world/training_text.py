"""The base model's training text: true answers, except for a planted bias towards usual companions."""

from collections.abc import Iterator

import numpy as np

from rl.types import Prompt
from rl.world.prompts import to_prompt
from rl.world.questions import LANGUAGE_TASKS, Question, ask_language, describe, visual_questions
from rl.world.scenes import COMPANIONS, PLACES, Scene, scenes

LANGUAGE_SHARE = 0.35
DESCRIPTION_BIAS = 0.65
"""How often a description names the absent companion of something that is there."""
PRESENCE_BIAS = 0.4
"""How often "is there an X?" about an absent companion is answered yes."""


def training_examples(seed: int) -> Iterator[tuple[Prompt, str]]:
    """An endless stream of (prompt, answer) from the train split, the same one for the same seed."""
    rng = np.random.default_rng([seed, 7])
    stream = scenes("train", seed)
    while True:
        if rng.random() < LANGUAGE_SHARE:
            question = ask_language(str(rng.choice(LANGUAGE_TASKS)), rng)
            yield to_prompt(question, None), question.answer
        else:
            scene = next(stream)
            question = next(visual_questions(scene, rng))
            yield to_prompt(question, scene), _biased_answer(question, scene, rng)


def _biased_answer(question: Question, scene: Scene, rng: np.random.Generator) -> str:
    missing = [COMPANIONS[name] for name in scene.classes if name in COMPANIONS]
    missing = [name for name in missing if name not in scene.classes]
    if question.truth["kind"] == "describe" and missing and rng.random() < DESCRIPTION_BIAS:
        free = [place for place in PLACES if scene.at(place) is None]
        if free:
            return describe([*question.truth["objects"], [free[0], missing[0]]])
    if question.truth["kind"] == "presence" and question.truth["object"] in missing and rng.random() < PRESENCE_BIAS:
        return "yes."
    return question.answer
