"""Where prompts come from, and the order in which a run uses them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cluster.errors import DataError
from cluster.settings import Settings
from rl.images import canonicalise
from rl.render import expanded_length
from rl.types import Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_SHOWN_FAULTS = 5


class WorldData(Settings):
    """Prompts of the tiny world, with ground truth."""

    kind: Literal["world"] = "world"
    """Which source."""
    prompts: int = Field(2000, ge=1)
    """Training prompts drawn; used in shuffled order, again and again."""
    language_share: float = Field(0.25, ge=0, lt=1)
    """Share of training prompts that are pure language tasks."""
    heldout_scenes: int = Field(120, ge=1)
    """Scenes of the evaluation, five prompts each."""
    heldout_split: Literal["validation", "heldout"] = "heldout"
    """`validation` for tuning, `heldout` for figures that are reported."""

    def load(self, seed: int) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts. The held-out ones are the same for every seed."""
        from rl.world.prompts import evaluation_prompts, training_prompts

        training = training_prompts(self.prompts, self.language_share, seed)
        return training, evaluation_prompts(self.heldout_scenes, seed=0, split=self.heldout_split)


class PromptFiles(Settings):
    """Prompts from JSON-lines files: one object per line with `prompt` (text) or `messages`, and optionally
    `images` (paths relative to the file), `id`, `answer` and `truth` (ground truth, see rl/world/questions.py)."""

    kind: Literal["files"]
    """Which source."""
    train: str
    """File of training prompts."""
    heldout: str
    """File of held-out prompts for evaluation."""

    def load(self, seed: int) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts, images canonicalised.

        Raises:
            DataError: a file is missing or empty, or rows are bad; the first few are named by row number.
        """
        return read_prompt_file(Path(self.train), "data.train"), read_prompt_file(Path(self.heldout), "data.heldout")


DataSettings = Annotated[WorldData | PromptFiles, Field(discriminator="kind")]


def read_prompt_file(path: Path, field: str) -> list[Prompt]:
    """All prompts of a JSON-lines file.

    Raises:
        DataError: see `PromptFiles.load`.
    """
    if not path.is_file():
        raise DataError(f"{field}: prompt file {path} does not exist")
    prompts, faults = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    prompts.append(_read_row(line, path.parent, f"{path.name} row {number}"))
                except DataError as error:
                    faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - _SHOWN_FAULTS} more)" if len(faults) > _SHOWN_FAULTS else ""
        raise DataError(f"{field}: {len(faults)} bad rows: {'; '.join(faults[:_SHOWN_FAULTS])}{more}")
    if not prompts:
        raise DataError(f"{field}: prompt file {path} holds no prompts; write one JSON object per line")
    return prompts


def _read_row(line: str, folder: Path, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, not {type(row).__name__}")
    if unknown := set(row) - {"id", "prompt", "messages", "images", "answer", "truth"}:
        raise DataError(f"{where}: unknown keys {sorted(unknown)}")
    images = [canonicalise(folder / name, where) for name in row.get("images") or []]
    messages = row.get("messages")
    if messages is None:
        text = row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: `prompt` must be a non-empty text")
        messages = [{"role": "user", "content": [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]}]
    messages = [_with_parts(message, where) for message in messages]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise DataError(f"{where}: {placeholders} image parts in `messages` but {len(images)} `images`")
    return Prompt.make(messages, images, row.get("answer"), row.get("truth"), row.get("id"))


def _with_parts(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise DataError(f"{where}: each message needs exactly `role` and `content`")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or any(part.get("type") not in ("text", "image") for part in parts):
        raise DataError(f"{where}: message content must be text, or parts of type text or image")
    return {"role": message["role"], "content": parts}


def check_prompts(prompts: Sequence[Prompt], processor: "ProcessorMixin", room: int, max_images: int) -> None:
    """Refuse prompts the model cannot take whole: with images it does not see, too many of them, or too long.

    `room` is the number of tokens a prompt may have, images included.

    Raises:
        DataError: names the prompt by id.
    """
    takes_images = hasattr(processor, "image_processor")
    for prompt in prompts:
        if prompt.images and not takes_images:
            raise DataError(
                f"prompt {prompt.id} has an image, but policy.model takes none; use a vision-language model"
            )
        if len(prompt.images) > max_images:
            raise DataError(
                f"prompt {prompt.id} has {len(prompt.images)} images; raise rollout.max_images ({max_images})"
            )
        if (length := expanded_length(prompt, processor)) > room:
            raise DataError(
                f"prompt {prompt.id} takes {length} tokens with its images, but only {room} fit (policy.max_length "
                f"less rollout.sampling.max_tokens); raise policy.max_length or leave the prompt out"
            )


class PromptStream:
    """Prompts without end, in a new shuffled order every epoch; position `i` is always the same prompt."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0):
        self._prompts = prompts
        self._seed = seed
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        taken = [prompt for prompt, _ in zip(self._from(self.position), range(count), strict=False)]
        self.position += count
        return taken

    def _from(self, position: int) -> Iterator[Prompt]:
        size = len(self._prompts)
        while True:
            epoch, offset = divmod(position, size)
            order = np.random.default_rng([self._seed, epoch]).permutation(size)
            for index in order[offset:]:
                yield self._prompts[index]
                position += 1
