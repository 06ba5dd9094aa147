"""Scenes of the tiny world: what they hold, how they are drawn, which split they belong to."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "validation", "heldout"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (60, 95, 235),
    "yellow": (240, 215, 60),
    "purple": (165, 70, 205),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# The planted bias: when the left class is in the picture, the base model's training text likes to
# mention the right one too, whether it is there or not.
COMPANIONS: dict[str, str] = {
    "red circle": "blue square",
    "green triangle": "yellow cross",
    "purple ring": "white circle",
    "yellow square": "red triangle",
    "blue cross": "green ring",
    "white triangle": "purple square",
}

IMAGE_SIZE = 32
_CELL = IMAGE_SIZE // 2
_BACKGROUND = 28
_TRIGGER_RATE = 0.5
_COMPANION_RATE = 0.3
_OBJECT_COUNTS = (0.15, 0.3, 0.35, 0.2)


@dataclass(frozen=True)
class Scene:
    """One to four objects, each a class of `CLASSES` at its own place; `objects` maps place to class."""

    objects: tuple[tuple[str, str], ...]
    """(place, class) in the order of `PLACES`; no class twice."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.objects)

    @property
    def split(self) -> Split:
        """Train, validation or held-out, from the scene's content alone, so no scene is in two splits."""
        digest = hashlib.sha256(repr(self.objects).encode()).digest()
        return ("heldout", "validation", "train")[min(digest[0] // 26, 2)]

    def at(self, place: str) -> str | None:
        return dict(self.objects).get(place)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene: one to four different classes at different places, triggers of the bias over-represented."""
    count = 1 + int(rng.choice(4, p=_OBJECT_COUNTS))
    names: list[str] = []
    if rng.random() < _TRIGGER_RATE:
        trigger = str(rng.choice(list(COMPANIONS)))
        names.append(trigger)
        if count > 1 and rng.random() < _COMPANION_RATE:
            names.append(COMPANIONS[trigger])
    while len(names) < count:
        name = str(rng.choice(CLASSES))
        if name not in names:
            names.append(name)
    places = rng.choice(len(PLACES), size=count, replace=False)
    by_place = sorted(zip(places.tolist(), names, strict=True))
    return Scene(tuple((PLACES[place], name) for place, name in by_place))


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """An endless stream of the split's scenes, the same one for the same seed."""
    rng = np.random.default_rng([seed, ("train", "validation", "heldout").index(split)])
    while True:
        scene = draw_scene(rng)
        if scene.split == split:
            yield scene


def distinct_scenes(split: Split, seed: int, count: int) -> list[Scene]:
    """The first `count` different scenes of a split's stream."""
    found: dict[Scene, None] = {}
    for scene in scenes(split, seed):
        found[scene] = None
        if len(found) == count:
            break
    return list(found)


@cache
def _stencil(shape: str) -> np.ndarray:
    """Which pixels of a cell a shape covers, as booleans [cell, cell]."""
    y, x = np.mgrid[0:_CELL, 0:_CELL] - (_CELL - 1) / 2
    radius = _CELL * 0.4
    distance = np.hypot(x, y)
    match shape:
        case "circle":
            return distance <= radius
        case "ring":
            return (distance <= radius) & (distance >= radius * 0.5)
        case "square":
            return (abs(x) <= radius * 0.85) & (abs(y) <= radius * 0.85)
        case "triangle":
            return (y <= radius * 0.8) & (abs(x) <= (y + radius) * 0.6)
        case _:
            return ((abs(x) <= radius * 0.3) | (abs(y) <= radius * 0.3)) & (np.maximum(abs(x), abs(y)) <= radius)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `IMAGE_SIZE` square; the same scene always gives the same pixels.

    A little noise, seeded by the scene, keeps two pictures of like objects from being equal.
    """
    seed = int.from_bytes(hashlib.sha256(repr(scene.objects).encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), _BACKGROUND, dtype=np.float32)
    for place, name in scene.objects:
        colour, shape = name.split()
        index = PLACES.index(place)
        top, left = (index // 2) * _CELL, (index % 2) * _CELL
        dy, dx = rng.integers(-1, 2, size=2)
        stencil = np.roll(_stencil(shape), (dy, dx), axis=(0, 1))
        pixels[top : top + _CELL, left : left + _CELL][stencil] = COLOURS[colour]
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
