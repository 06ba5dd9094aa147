"""Plausible corruptions of true answers, as an annotator writes them for preference sets such as POVID's (arXiv
2402.11411; arXiv 2407.02477, table 13)."""

import numpy as np

from rl.types import Prompt
from rl.world.questions import LETTERS, describe
from rl.world.scenes import CLASSES, COMPANIONS, PLACES

_ADDED, _CHANGED = 0.5, 0.3


def corrupted_answer(prompt: Prompt, rng: np.random.Generator) -> str:
    """A wrong answer that someone who sees only the text would believe: an object is added (a usual companion first),
    changed or moved, a yes is a no, a count is off by one, two letters change places."""
    truth = prompt.truth or {}
    match truth["kind"]:
        case "describe":
            return describe(_corrupted_objects([list(one) for one in truth["objects"]], rng))
        case "presence":
            return "no." if truth["answer"] == "yes" else "yes."
        case "count" | "sum":
            number = int(truth["answer"])
            return f"{number + 1 if number == 0 or rng.random() < 0.5 else number - 1}."
        case "place":
            return f"a {_other_class([truth['answer'].removeprefix('a ')], rng)}."
        case _:
            return f"{_corrupted_letters(truth['answer'].split(), rng)}."


def _corrupted_objects(objects: list[list[str]], rng: np.random.Generator) -> list[list[str]]:
    named = [name for _, name in objects]
    free = [place for place in PLACES if place not in {place for place, _ in objects}]
    how = rng.random()
    if free and how < _ADDED:
        usual = [COMPANIONS[name] for name in named if COMPANIONS.get(name, name) not in named]
        return [*objects, [free[0], usual[0] if usual else _other_class(named, rng)]]
    index = int(rng.integers(len(objects)))
    place, name = objects[index]
    if free and how > _ADDED + _CHANGED:
        objects[index] = [str(rng.choice(free)), name]
    else:
        objects[index] = [place, _other_class(named, rng)]
    return objects


def _other_class(named: list[str], rng: np.random.Generator) -> str:
    return str(rng.choice([name for name in CLASSES if name not in named]))


def _corrupted_letters(letters: list[str], rng: np.random.Generator) -> str:
    index = int(rng.integers(len(letters)))
    letters[index] = str(rng.choice([letter for letter in LETTERS if letter != letters[index]]))
    return " ".join(letters)
