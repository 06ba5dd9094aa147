"""Where prompts come from, and the order in which a run uses them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from cluster.errors import DataError
from cluster.settings import LocalPath, Settings
from rl.formats import Fault, FormatName, Record, counted, read_records
from rl.images import canonicalise
from rl.render import expanded_length, placeholders
from rl.types import Prompt

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_SHOWN_FAULTS = 5
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
T = TypeVar("T")
BadRows = Literal["refuse", "skip"]
Report = Callable[[Sequence[Fault]], None]
"""Is given the rows that cannot be used, all of them, before anything is raised for them."""


class PromptSets(NamedTuple):
    """What a run trains on and what it is measured on; no image is in both."""

    training: list[Prompt]
    heldout: list[Prompt]


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

    def files(self) -> list[tuple[str, str]]:
        """None: the world is drawn."""
        return []

    def load(self, seed: int, report: Report) -> PromptSets:
        """The held-out prompts are the same for every seed."""
        from rl.world.prompts import evaluation_prompts, training_prompts

        training = training_prompts(self.prompts, self.language_share, seed)
        return PromptSets(training, evaluation_prompts(self.heldout_scenes, seed=0, split=self.heldout_split))


class FileSettings(Settings):
    """Rows of files in one of the formats that data sets come in."""

    images: LocalPath | None = None
    """Folder that image names are relative to; left out, the data file's own."""
    start: int = Field(0, ge=0)
    """Records to pass over at the beginning of the training file."""
    limit: int | None = Field(None, ge=1)
    """Most records taken from the training file; all if left out."""
    bad_rows: BadRows = "refuse"
    """What becomes of the run when a row cannot be used; either way bad-rows.jsonl in the run folder lists them all."""

    def records(
        self, path: str, format: FormatName, field: str, report: Report, start: int = 0, limit: int | None = None
    ) -> "list[Usable]":
        """The usable records of a file as prompts.

        Raises:
            DataError: it is missing, holds none, or has bad rows and they are to be refused.
        """
        folder = Path(self.images) if self.images else None
        usable, faults = [], []
        try:
            for index, (file, row, record) in enumerate(read_records(Path(path), format, folder)):
                if index < start or (limit is not None and index >= start + limit):
                    continue
                if isinstance(record, Fault):
                    faults.append(record)
                    continue
                try:
                    usable.append(Usable(to_prompt(record, Path(path).stem), record, (file, row)))
                except DataError as error:
                    faults.append(Fault(file, row, str(error)))
        except DataError as error:
            raise DataError(f"{field}: {error}") from error
        if faults:
            report(faults)
        if faults and self.bad_rows == "refuse":
            section = field.rpartition(".")[0]
            more = f" (and {len(faults) - _SHOWN_FAULTS} more)" if len(faults) > _SHOWN_FAULTS else ""
            shown = "; ".join(map(str, faults[:_SHOWN_FAULTS]))
            if not usable and len(faults) > 1 and len({fault.why for fault in faults}) == 1:
                raise DataError(f"{field}: no row can be used: {faults[0].why}; is {section}.format right?")
            raise DataError(
                f"{field}: {counted(len(faults), 'bad row')}: {shown}{more}; mend them, or leave them out with "
                f"{section}.bad_rows=skip"
            )
        if not usable:
            raise DataError(f"{field}: {path} holds no usable row")
        return usable


class Usable(NamedTuple):
    """A record with its images canonicalised."""

    prompt: Prompt
    record: Record
    where: tuple[str, int]
    """File name and row."""


class PromptFiles(FileSettings):
    """Prompts from files of the user's."""

    kind: Literal["files"]
    """Which source."""
    format: FormatName = "prompts"
    """What the rows hold. `prompts` is our own: `prompt` (text) or `messages`, and optionally `images`, `answer`,
    `id` and `truth` (see rl/world/questions.py)."""
    train: LocalPath
    """File, or folder of files, with training prompts: .jsonl, .json, .csv or .parquet."""
    heldout: LocalPath | None = None
    """File of held-out prompts for evaluation; left out, a share of the training file."""
    heldout_share: float = Field(0.1, ge=0, lt=1)
    """Share held out where there is no file for it; all prompts of an image go to the same side."""

    def files(self) -> list[tuple[str, str]]:
        """What is read: the field that names it, and its path."""
        return [("data.train", self.train)] + ([("data.heldout", self.heldout)] if self.heldout else [])

    def load(self, seed: int, report: Report) -> PromptSets:
        """Prompts with their images canonicalised.

        Raises:
            DataError: see `FileSettings.records`.
        """
        usable = self.records(self.train, self.format, "data.train", report, self.start, self.limit)
        prompts = [one.prompt for one in usable]
        if self.heldout is None:
            return split_by_image(prompts, self.heldout_share)
        heldout = [one.prompt for one in self.records(self.heldout, self.format, "data.heldout", report)]
        return without_leaks(prompts, heldout)


class ImageFolder(Settings):
    """One question about every image of a folder."""

    kind: Literal["image_folder"]
    """Which source."""
    path: LocalPath
    """The folder; searched with all folders in it."""
    question: str
    """What is asked of each image."""
    heldout_share: float = Field(0.1, ge=0, lt=1)
    """Share held out for evaluation."""
    bad_rows: BadRows = "refuse"
    """What becomes of the run when an image cannot be read."""

    def files(self) -> list[tuple[str, str]]:
        """What is read: the field that names it, and its path."""
        return [("data.path", self.path)]

    def load(self, seed: int, report: Report) -> PromptSets:
        """Prompts in the order of the images' names.

        Raises:
            DataError: there is no such folder, no image in it, or a bad one and bad ones are to be refused.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            raise DataError(f"data.path: folder {folder} does not exist")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        prompts, faults = [], []
        content = [{"type": "image"}, {"type": "text", "text": self.question}]
        for row, file in enumerate(files, start=1):
            try:
                image = canonicalise(file, file.name)
                prompts.append(Prompt.make([{"role": "user", "content": content}], [image], source=folder.name))
            except DataError as error:
                faults.append(Fault(str(file.relative_to(folder)), row, str(error)))
        if faults:
            report(faults)
            if self.bad_rows == "refuse":
                raise DataError(
                    f"data.path: {counted(len(faults), 'bad image')}: {faults[0]}; remove them, "
                    f"or set data.bad_rows=skip"
                )
        if not prompts:
            raise DataError(f"data.path: {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return split_by_image(prompts, self.heldout_share)


_Single = WorldData | PromptFiles | ImageFolder
SingleSource = Annotated[_Single, Field(discriminator="kind")]


class MixedPart(Settings):
    """One source of a mixture."""

    data: SingleSource
    """Any source but a mixture."""
    weight: float = Field(1.0, gt=0)
    """Its share of the training prompts, in proportion to the other weights."""


class MixedData(Settings):
    """Several sources, their prompts mixed by weight in an order that the seed settles."""

    kind: Literal["mixed"]
    """Which source."""
    parts: tuple[MixedPart, ...] = Field(min_length=2)
    """A list of sources with their weights."""
    prompts: int | None = Field(None, ge=1)
    """Training prompts in all; left out, as many as the weights allow without using any twice."""

    def files(self) -> list[tuple[str, str]]:
        """What is read: the field that names it, and its path."""
        return [file for part in self.parts for file in part.data.files()]

    def load(self, seed: int, report: Report) -> PromptSets:
        """Drawn from each source without replacement; held out is what each source holds out.

        Raises:
            DataError: a source has too few prompts for its share of `prompts`.
        """
        sets = [part.data.load(seed, report) for part in self.parts]
        weights = [part.weight / sum(one.weight for one in self.parts) for part in self.parts]
        most = min(len(one.training) / weight for one, weight in zip(sets, weights, strict=True))
        total = self.prompts or int(most)
        rng = np.random.default_rng([seed, 17])
        drawn: list[Prompt] = []
        for index, (one, weight) in enumerate(zip(sets, weights, strict=True)):
            count = round(total * weight)
            if count > len(one.training):
                raise DataError(
                    f"data.parts: part {index + 1} has {len(one.training)} prompts, but its share of {total} is "
                    f"{count}; lower data.prompts to {int(most)} or change the weights"
                )
            drawn += [one.training[i] for i in rng.permutation(len(one.training))[:count]]
        mixed = [drawn[i] for i in rng.permutation(len(drawn))]
        return without_leaks(mixed, [prompt for one in sets for prompt in one.heldout])


DataSettings = Annotated[_Single | MixedData, Field(discriminator="kind")]


def check_files(files: Sequence[tuple[str, str]]) -> None:
    """Refuse, before anything is started, files that are not there.

    Raises:
        DataError: names the field and the path.
    """
    for field, path in files:
        if not Path(path).exists():
            raise DataError(f"{field}: {path} does not exist")


def to_prompt(record: Record, source: str) -> Prompt:
    """The record's prompt, its images canonicalised.

    Raises:
        DataError: an image is missing or cannot be used.
    """
    images = [canonicalise(image, "image") for image in record.images]
    prompt = Prompt.make(record.messages, images, record.answer, record.truth, source=source)
    # Data sets give one id to several questions; prompts need their own.
    return replace(prompt, id=f"{record.id}-{prompt.id[:8]}") if record.id else prompt


def split_by_image(prompts: Sequence[Prompt], share: float) -> PromptSets:
    """Hold out about `share` of the prompts. Which, is settled by what they show (or say, where they show nothing), so
    that an image never is on both sides, here or in another source; at least one prompt is on either side."""
    if share == 0:
        return PromptSets(list(prompts), [])
    keys = [_split_key(prompt) for prompt in prompts]
    low, high = min(keys), max(keys)
    if low == high:
        raise DataError("data: all prompts show the same image, so none can be held out; give a data.heldout file")
    held = [key == low or (key < share and key != high) for key in keys]
    return without_leaks(  # a prompt may show several images, of which only the first settled its side
        [prompt for prompt, out in zip(prompts, held, strict=True) if not out],
        [prompt for prompt, out in zip(prompts, held, strict=True) if out],
    )


def without_leaks(training: Sequence[Prompt], heldout: Sequence[Prompt]) -> PromptSets:
    """The training prompts that share no image with the held-out ones, and these.

    Raises:
        DataError: none is left.
    """
    seen = {image.digest for prompt in heldout for image in prompt.images}
    kept = [prompt for prompt in training if not any(image.digest in seen for image in prompt.images)]
    if not kept:
        raise DataError("data: every training prompt shows an image of the held-out prompts; hold out other images")
    return PromptSets(kept, list(heldout))


def _split_key(prompt: Prompt) -> float:
    """A number from 0 to 1 that is the same for all prompts about the same image."""
    content = prompt.images[0].digest if prompt.images else prompt.text
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48


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
        if (found := placeholders(prompt, processor)) != len(prompt.images):
            raise DataError(
                f"prompt {prompt.id} has {len(prompt.images)} images but {found} image placeholders in its text; "
                f"take the placeholder out of the text"
            )
        if (length := expanded_length(prompt, processor)) > room:
            raise DataError(
                f"prompt {prompt.id} takes {length} tokens with its images, but only {room} fit (policy.max_length "
                f"less rollout.sampling.max_tokens); raise policy.max_length or leave the prompt out"
            )


class ShuffledStream(Generic[T]):
    """Items without end, in a new shuffled order every epoch; position `i` is always the same item."""

    def __init__(self, items: Sequence[T], seed: int, position: int = 0):
        self._items = items
        self._seed = seed
        self.position = position

    def take(self, count: int) -> list[T]:
        """The next `count` items."""
        taken = [item for item, _ in zip(self._from(self.position), range(count), strict=False)]
        self.position += count
        return taken

    def _from(self, position: int) -> Iterator[T]:
        size = len(self._items)
        while True:
            epoch, offset = divmod(position, size)
            order = np.random.default_rng([self._seed, epoch]).permutation(size)
            for index in order[offset:]:
                yield self._items[index]
                position += 1
