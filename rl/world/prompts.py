"""Prompts of the tiny world for training and evaluation."""

import numpy as np

from rl.images import canonicalise
from rl.types import Prompt
from rl.world.questions import (
    LANGUAGE_TASKS,
    NEGATIVES,
    Question,
    ask_count,
    ask_describe,
    ask_language,
    ask_place,
    ask_presence,
    visual_questions,
)
from rl.world.scenes import Scene, Split, distinct_scenes, render


def to_prompt(question: Question, scene: Scene | None) -> Prompt:
    """The question as a one-turn prompt, with the scene's picture before the text if there is a scene."""
    images = (canonicalise(render(scene), "scene"),) if scene else ()
    content: list[dict[str, str]] = [{"type": "image"} for _ in images] + [{"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    return Prompt.make(messages, images, reference_answer=question.answer, truth=question.truth, source="world")


def training_prompts(count: int, language_share: float, seed: int, split: Split = "train") -> list[Prompt]:
    """A mix of visual questions over distinct scenes, and language tasks so that language is not forgotten."""
    rng = np.random.default_rng([seed, 11])
    prompts = []
    for scene in distinct_scenes(split, seed, count):
        if rng.random() < language_share:
            prompts.append(to_prompt(ask_language(str(rng.choice(LANGUAGE_TASKS)), rng), None))
        else:
            prompts.append(to_prompt(next(visual_questions(scene, rng)), scene))
    return prompts


def evaluation_prompts(scene_count: int, seed: int, split: Split = "heldout") -> list[Prompt]:
    """For each scene a description, a POPE question with each answer, and in turn a count or a place question;
    beside them one language task per scene.

    POPE takes its negatives from the random, popular and adversarial pools in equal parts and asks as many
    questions with the answer yes as with no.
    """
    rng = np.random.default_rng([seed, 13])
    prompts = []
    for index, scene in enumerate(distinct_scenes(split, seed, scene_count)):
        negatives = NEGATIVES[index % len(NEGATIVES)]
        visual = [
            ask_describe(scene, rng),
            ask_presence(scene, rng, True, negatives),
            ask_presence(scene, rng, False, negatives),
            ask_count(scene) if index % 2 else ask_place(scene, rng),
        ]
        prompts += [to_prompt(question, scene) for question in visual]
        prompts.append(to_prompt(ask_language(LANGUAGE_TASKS[index % len(LANGUAGE_TASKS)], rng), None))
    return prompts
