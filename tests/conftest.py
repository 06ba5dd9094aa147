"""Shared builders: completions, judgements and pairs with as little said as a test needs."""

import os

import pytest

from rl.images import canonicalise
from rl.types import Completion, Judgement, Pair, PairValues, Prompt
from rl.world.scenes import Scene, render

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SCENE = Scene((("top left", "red circle"), ("bottom right", "green cross")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none"))


def make_prompt(text: str = "What do you see?", scene: Scene | None = SCENE, **more: object) -> Prompt:
    images = (canonicalise(render(scene), "scene"),) if scene else ()
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    return Prompt.make([{"role": "user", "content": content}], images, **more)  # type: ignore[arg-type]


def make_completion(
    text: str = "yes.", tokens: tuple[int, ...] = (5, 6, 2), version: int = 0, prompt_id: str = "p"
) -> Completion:
    return Completion(prompt_id, (1, 5, 6), tokens, text, tuple(-0.5 for _ in tokens), version, "stop")


def make_judgement(score: float | None) -> Judgement:
    return Judgement(score, None, "because", "test", "hash")


def make_pair(version: int = 0, prompt: Prompt | None = None, **more: object) -> Pair:
    prompt = prompt or make_prompt()
    good = make_completion("good.", (5, 2), version, prompt.id)
    bad = make_completion("bad.", (6, 7, 2), version, prompt.id)
    return Pair(
        prompt=prompt,
        completions=PairValues(good, bad),
        judgements=PairValues(make_judgement(9), make_judgement(4)),
        margin=5,
        source="online",
        policy_version=version,
        **more,  # type: ignore[arg-type]
    )
