"""What the tiny world's truth says about an answer: objects named, yes or no, five attributes."""

import hashlib
import re
from typing import Any, NamedTuple

from rl.types import Attributes
from rl.world.scenes import COLOURS, PLACES, SHAPES

RULES = "objects 1: hallucination -2, misplaced -1, recall, form; answers 1: exact"
RULES_HASH = hashlib.sha256(RULES.encode()).hexdigest()[:12]

_MENTION = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b(?: at the ({'|'.join(PLACES)}))?")
_SENTENCE = re.compile(rf"there is a (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}) at the (?:{'|'.join(PLACES)})")


class Mention(NamedTuple):
    """An object named in a text; `place` is None where the text gives none."""

    name: str
    place: str | None


def mentions(text: str) -> list[Mention]:
    """Every object of the world that a text names, in order."""
    return [Mention(f"{m[1]} {m[2]}", m[3]) for m in _MENTION.finditer(text.lower())]


def hallucinated(text: str, truth: dict[str, Any]) -> list[str]:
    """The mentions in a description of objects that are not there (CHAIR, Rohrbach et al. 2018)."""
    present = {name for _, name in truth["objects"]}
    return [mention.name for mention in mentions(text) if mention.name not in present]


def says_yes(text: str) -> bool:
    """POPE's reading of an answer (Li et al. 2023): no if its first sentence holds no or not, otherwise yes."""
    words = text.split(".")[0].replace(",", "").lower().split()
    return not any(word in ("no", "not") for word in words)


def is_correct(truth: dict[str, Any], text: str) -> bool:
    """Whether an answer to any question but a description is right."""
    if truth["kind"] == "presence":
        return says_yes(text) == (truth["answer"] == "yes")
    return _normal(text) == _normal(truth["answer"])


def grade_answer(truth: dict[str, Any], text: str, finished: bool) -> tuple[Attributes, str]:
    """Five attributes from 0 to 4 and the reason for them. An unfinished answer was cut at the token limit."""
    if truth["kind"] == "describe":
        return _grade_description(truth, text, finished)
    right = is_correct(truth, text)
    grade = 4 if right else 0
    coherence = 4 if finished and len(text.split()) <= len(truth["answer"].split()) + 1 else 1
    verbosity = min(4, len(text.split()) // 4)
    reason = f"the answer is {truth['answer']}" + ("" if right else f", not {text!r}")
    return Attributes(grade, grade, coherence, grade // 4, verbosity), reason


def _grade_description(truth: dict[str, Any], text: str, finished: bool) -> tuple[Attributes, str]:
    there = {name: place for place, name in truth["objects"]}
    named = mentions(text)
    invented = [mention.name for mention in named if mention.name not in there]
    misplaced = [m.name for m in named if m.name in there and m.place is not None and m.place != there[m.name]]
    found = {mention.name for mention in named} & set(there)
    missed = [name for name in there if name not in found]
    correctness = max(0, 4 - 2 * len(invented) - len(misplaced)) if named else 0
    sentences = [sentence.strip() for sentence in text.lower().split(".") if sentence.strip()]
    malformed = sum(_SENTENCE.fullmatch(sentence) is None for sentence in sentences)
    repeated = len(named) - len({mention.name for mention in named})
    coherence = max(0, 4 - malformed - repeated - (0 if finished else 2)) if sentences else 0
    attributes = Attributes(
        helpfulness=round(4 * len(found) / len(there)),
        correctness=correctness,
        coherence=coherence,
        complexity=min(4, len(named)),
        verbosity=min(4, len(text.split()) // 8),
    )
    faults = [
        f"{label} {', '.join(names)}"
        for label, names in (("not there:", invented), ("misplaced:", misplaced), ("left out:", missed))
        if names
    ]
    return attributes, "; ".join(faults) or "everything named is there and everything there is named"


def _normal(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").split())
