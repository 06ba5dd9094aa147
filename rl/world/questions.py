"""Questions about scenes, pure language tasks, and their true answers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from rl.world.scenes import CLASSES, COMPANIONS, PLACES, Scene, draw_scene

Negatives = Literal["random", "popular", "adversarial"]
NEGATIVES: tuple[Negatives, ...] = ("random", "popular", "adversarial")
LETTERS = tuple("bcdefghjkm")
LANGUAGE_TASKS = ("copy", "reverse", "sort", "sum")
DESCRIBE = ("Describe the image.", "What do you see?", "List the objects in the image.")
_MAX_ADDEND = 9
_LETTERS_PER_TASK = (2, 5)


@dataclass(frozen=True)
class Question:
    """A question with its ground truth.

    `truth["kind"]` is describe, presence, count, place or one of `LANGUAGE_TASKS`. Every kind but describe
    has `truth["answer"]`; describe has `truth["objects"]`, a list of [place, class].
    """

    text: str
    truth: dict[str, Any]

    @property
    def answer(self) -> str:
        """The true answer as the base model was taught to write it."""
        if self.truth["kind"] == "describe":
            return describe(self.truth["objects"])
        return f"{self.truth['answer']}."


def check_truth(truth: Any) -> None:
    """Refuse what is no ground truth of a question.

    Raises:
        ValueError: says what is wrong, in a few words.
    """
    kinds = ("describe", "presence", "count", "place", *LANGUAGE_TASKS)
    if not isinstance(truth, dict) or truth.get("kind") not in kinds:
        raise ValueError(f"`truth` must be an object with a `kind` of {', '.join(kinds)}")
    if truth["kind"] == "describe":
        objects = truth.get("objects")
        pairs = isinstance(objects, list) and all(isinstance(one, list) and len(one) == 2 for one in objects)
        if not (pairs and objects and all(place in PLACES and name in CLASSES for place, name in objects)):
            raise ValueError("`truth` of kind describe needs `objects`, a list of [place, class] of the tiny world")
    elif not isinstance(truth.get("answer"), str):
        raise ValueError(f"`truth` of kind {truth['kind']} needs an `answer`, a text")
    if truth["kind"] == "presence" and truth.get("negatives") not in NEGATIVES:
        raise ValueError(f"`truth` of kind presence needs `negatives`: {', '.join(NEGATIVES)}")


def describe(objects: list[list[str]]) -> str:
    """One sentence per object, in reading order."""
    return " ".join(f"there is a {name} at the {place}." for place, name in objects)


def ask_describe(scene: Scene, rng: np.random.Generator) -> Question:
    return Question(str(rng.choice(DESCRIBE)), {"kind": "describe", "objects": [list(o) for o in scene.objects]})


def ask_presence(scene: Scene, rng: np.random.Generator, present: bool, negatives: Negatives) -> Question:
    """Is there an X? (POPE, Li et al. 2023); an absent X is random, frequent, or usual beside what is there."""
    name = str(rng.choice(scene.classes)) if present else _absent(scene, rng, negatives)
    truth = {"kind": "presence", "answer": "yes" if present else "no", "object": name, "negatives": negatives}
    return Question(f"Is there a {name} in the image?", truth)


def ask_count(scene: Scene) -> Question:
    return Question("How many objects are there?", {"kind": "count", "answer": str(len(scene.objects))})


def ask_place(scene: Scene, rng: np.random.Generator) -> Question:
    place = str(rng.choice(PLACES))
    name = scene.at(place)
    return Question(f"What is at the {place}?", {"kind": "place", "answer": f"a {name}" if name else "nothing"})


def ask_language(task: str, rng: np.random.Generator) -> Question:
    """A task without an image: copy, reverse or sort letters, or add two numbers."""
    if task == "sum":
        a, b = rng.integers(0, _MAX_ADDEND + 1, size=2)
        return Question(f"What is {a} plus {b}?", {"kind": task, "answer": str(a + b)})
    letters = [str(x) for x in rng.choice(LETTERS, size=rng.integers(_LETTERS_PER_TASK[0], _LETTERS_PER_TASK[1] + 1))]
    answer = {"copy": letters, "reverse": letters[::-1], "sort": sorted(letters)}[task]
    return Question(f"{task.capitalize()}: {' '.join(letters)}", {"kind": task, "answer": " ".join(answer)})


def visual_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """An endless mix of questions about one scene, for training text and training prompts."""
    while True:
        kind = rng.choice(["describe", "presence", "count", "place"], p=[0.4, 0.3, 0.1, 0.2])
        match kind:
            case "describe":
                yield ask_describe(scene, rng)
            case "presence":
                yield ask_presence(scene, rng, bool(rng.random() < 0.5), NEGATIVES[rng.integers(3)])
            case "count":
                yield ask_count(scene)
            case _:
                yield ask_place(scene, rng)


@cache
def _popular(count: int = 8) -> tuple[str, ...]:
    """The classes seen most often, counted over a fixed sample of scenes."""
    rng = np.random.default_rng(0)
    counts = Counter(name for _ in range(2000) for name in draw_scene(rng).classes)
    return tuple(name for name, _ in counts.most_common(count))


def _absent(scene: Scene, rng: np.random.Generator, negatives: Negatives) -> str:
    pools = {
        "random": CLASSES,
        "popular": _popular(),
        "adversarial": tuple(COMPANIONS[name] for name in scene.classes if name in COMPANIONS),
    }
    absent = [name for name in pools[negatives] if name not in scene.classes]
    return str(rng.choice(absent or [name for name in CLASSES if name not in scene.classes]))
