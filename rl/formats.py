"""The data sets people have, read row by row: each format is one function from a row to records.

A new format is one function here and one line in `FORMATS`.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.errors import DataError
from rl.types import Attributes, Message
from rl.world.questions import check_truth

ImageSource = Path | bytes
FormatName = Literal[
    "prompts", "trl", "llava", "lrv", "scigraphqa", "helpsteer", "rlaif_v", "rlhf_v", "vlfeedback", "povid"
]
TABLES = (".jsonl", ".json", ".csv", ".parquet")
IMAGE_PLACEHOLDER = "<image>"
NOT_RATED = {"", "n/a", "na", "none"}


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer in a data set with what the data set says of it."""

    text: str
    score: float | None
    """Higher is better among the answers of the record; None if it was not judged."""
    attributes: Attributes | None = None


@dataclass(frozen=True)
class Record:
    """What one row asks, and the answers it brings."""

    messages: tuple[Message, ...]
    """Ends with the user's turn; as many image parts as `images`."""
    images: tuple[ImageSource, ...] = ()
    answer: str | None = None
    """The reference answer."""
    judged: tuple[JudgedAnswer, ...] = ()
    preference: bool = False
    """Whether `judged` is a chosen and a rejected answer, without scores of their own."""
    id: str | None = None
    truth: dict[str, Any] | None = None


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used."""

    file: str
    row: int
    """Counted from 1, blank lines and a CSV's heading left out."""
    why: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.why}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


@dataclass(frozen=True)
class Format:
    """How rows of a data set become records."""

    read: Callable[[dict[str, Any], Path], Iterable[Record]]
    """From a row and the folder of its images. Raises ValueError with a few words for a row it cannot use."""
    required: frozenset[str]
    known: frozenset[str] | None = None
    """All columns there may be, where a misspelt one must not pass; None allows more."""
    joins_neighbours: bool = False
    """Whether consecutive rows of the same prompt are one record."""


def read_records(path: Path, format: FormatName, images: Path | None) -> Iterator[tuple[str, int, Record | Fault]]:
    """All records of a file, or of the files in a folder, with file name and row number; faults in their places.

    `images` is the folder that image names are relative to, the data file's own if None.

    Raises:
        DataError: the file is missing, or cannot be read at all.
    """
    rows = _parsed_rows(path, FORMATS[format], images)
    return _join_neighbours(rows) if FORMATS[format].joins_neighbours else rows


def _parsed_rows(path: Path, format: Format, images: Path | None) -> Iterator[tuple[str, int, Record | Fault]]:
    for file in _tables(path):
        for number, row in enumerate(_rows(file), start=1):
            try:
                for record in _checked(row, format, images or file.parent):
                    yield file.name, number, record
            except ValueError as error:
                yield file.name, number, Fault(file.name, number, str(error))
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                why = f"not of the shape that this format has ({type(error).__name__}: {error})"
                yield file.name, number, Fault(file.name, number, why)


def _checked(row: Any, format: Format, images: Path) -> Iterable[Record]:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"an object with columns is expected, not {type(row).__name__}")
    if missing := format.required - set(row):
        raise ValueError(f"column {sorted(missing)[0]!r} is missing (there are {sorted(row)})")
    if format.known is not None and (unknown := set(row) - format.known):
        raise ValueError(f"unknown column {sorted(unknown)[0]!r} (known are {sorted(format.known)})")
    return format.read(row, images)


def _join_neighbours(rows: Iterator[tuple[str, int, Record | Fault]]) -> Iterator[tuple[str, int, Record | Fault]]:
    waiting: tuple[str, int, Record] | None = None
    for file, number, record in rows:
        if isinstance(record, Fault):
            yield file, number, record
        elif waiting is not None and waiting[2].messages == record.messages:
            joined = replace(waiting[2], judged=waiting[2].judged + record.judged)
            waiting = (waiting[0], waiting[1], joined)
        else:
            if waiting is not None:
                yield waiting
            waiting = (file, number, record)
    if waiting is not None:
        yield waiting


def _tables(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in TABLES)
        if not files:
            raise DataError(f"{path} holds no file ending in {', '.join(TABLES)}")
        return files
    if not path.is_file():
        raise DataError(f"file {path} does not exist")
    if path.suffix not in TABLES:
        raise DataError(f"file {path} is none of {', '.join(TABLES)}")
    return [path]


def _rows(file: Path) -> Iterator[Any]:
    """Rows as dictionaries; a ValueError in place of one that cannot be parsed."""
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                yield from csv.DictReader(stream)
        else:
            yield from _json_rows(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"file {file} cannot be read ({error})") from error
    except ValueError as error:  # pyarrow's errors are such
        raise DataError(f"file {file} cannot be read ({str(error).splitlines()[0]})") from error


def _json_rows(file: Path) -> Iterator[Any]:
    """A JSON list, or a JSON object per line, whatever the file is called."""
    with file.open(encoding="utf-8") as stream:
        start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        stream.seek(0)
        if start == "[":
            yield from json.load(stream)
            return
        for line in stream:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield ValueError(f"not JSON ({error})")


# One function per format.


def _prompts(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """Our own: `prompt` or `messages`, and optionally `image` or `images`, `answer`, `id`, `truth`."""
    images = [folder / name for name in _names(row.get("images")) + _names(row.get("image"))]
    if row.get("messages") is not None:
        messages = _messages(row["messages"], len(images))
    else:
        messages = _user(_text(row, "prompt"), len(images))
    if (truth := row.get("truth")) is not None:
        check_truth(truth)
    answer = None if row.get("answer") in (None, "") else _nonempty(row["answer"], "answer")
    yield Record(messages, tuple(images), answer, id=_optional_text(row.get("id")), truth=truth)


def _trl(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """TRL's preference sets, standard and conversational, with explicit or implicit prompt."""
    images = _trl_images(row, folder)
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if prompt is None:
        prompt, chosen, rejected = _common_prompt(chosen, rejected)
    messages = (
        _user(_nonempty(prompt, "prompt"), len(images)) if isinstance(prompt, str) else _messages(prompt, len(images))
    )
    yield _preference(messages, images, _answer_text(chosen, "chosen"), _answer_text(rejected, "rejected"))


def _llava(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """LLaVA-Instruct: the last answer of the conversation is the reference answer."""
    images = tuple(folder / name for name in _names(row.get("image")))
    messages, answer = _conversation(row["conversations"], len(images))
    yield Record(messages, images, answer, id=_optional_text(row.get("id")))


def _povid(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    images = tuple(folder / name for name in _names(row.get("image")))
    messages, chosen = _conversation(row["conversations"], len(images))
    _, rejected = _conversation(row["rejected_conversations"], len(images))
    yield _preference(messages, images, chosen, rejected)


def _lrv(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """LRV-Instruction: pictures are Visual Genome's, named by their number."""
    images = (folder / f"{_text(row, 'image_id')}.jpg",)
    yield Record(_user(_text(row, "question"), 1), images, _text(row, "answer"))


def _scigraphqa(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """SciGraphQA: a record for each question about a figure."""
    images = (folder / _text(row, "image_file"),)
    turns = row["q_a_pairs"]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    if not turns:
        raise ValueError("'q_a_pairs' is empty")
    for index, turn in enumerate(turns):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise ValueError(f"'q_a_pairs' entry {index} is not a question with an answer")
        question, answer = (_nonempty(part, f"q_a_pairs entry {index}") for part in turn)
        yield Record(_user(question, 1), images, answer)


def _helpsteer(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """HelpSteer and HelpSteer2; `<extra_id_1>` begins the turns after the first."""
    grades = []
    for name in Attributes._fields:
        try:
            grades.append(int(row[name]))
        except (TypeError, ValueError):
            raise ValueError(f"{name!r} is {row[name]!r}, not a number from 0 to 4") from None
        if not 0 <= grades[-1] <= 4:
            raise ValueError(f"{name!r} is {grades[-1]}, not from 0 to 4")
    attributes = Attributes(*grades)
    score = float(attributes.helpfulness + attributes.correctness + attributes.coherence)
    messages = []
    for index, turn in enumerate(_text(row, "prompt").split("<extra_id_1>")):
        role, _, text = ("User", "", turn) if index == 0 else turn.partition("\n")
        messages.append(_message(role.strip().lower(), text.strip()))
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"][0]["text"]:
        messages.pop()
    yield Record(tuple(messages), judged=(JudgedAnswer(_text(row, "response"), score, attributes),))


def _rlaif_v(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    images = (_image(row["image"], folder),)
    yield _preference(_user(_text(row, "question"), 1), images, _text(row, "chosen"), _text(row, "rejected"))


def _rlhf_v(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """RLHF-V keeps question and answers in a JSON string."""
    try:
        inner = json.loads(row["text"]) if isinstance(row["text"], str) else row["text"]
    except json.JSONDecodeError:
        raise ValueError("'text' is not the JSON object it should be") from None
    if not isinstance(inner, dict):
        raise ValueError("'text' is not the JSON object it should be")
    images = (_image(row["image"], folder),)
    yield _preference(_user(_text(inner, "question"), 1), images, _text(inner, "chosen"), _text(inner, "rejected"))


def _vlfeedback(row: dict[str, Any], folder: Path) -> Iterable[Record]:
    """VLFeedback: answers of several models, each aspect rated from 1 to 5 in words; the score is their sum."""
    judged = []
    for index, completion in enumerate(row["completions"]):
        if not isinstance(completion, dict) or "annotations" not in completion:
            raise ValueError(f"'completions' entry {index} has no annotations")
        ratings = [str(aspect["Rating"]).strip() for aspect in completion["annotations"].values()]
        rated = all(rating.lower() not in NOT_RATED for rating in ratings)
        try:
            score = float(sum(float(rating) for rating in ratings)) if rated else None
        except ValueError:
            raise ValueError(f"'completions' entry {index} has the ratings {ratings}") from None
        judged.append(JudgedAnswer(_text(completion, "response"), score))
    yield Record(
        _user(_text(row, "prompt"), 1), (folder / _text(row, "img_path"),), judged=tuple(judged), id=row.get("id")
    )


FORMATS: dict[FormatName, Format] = {
    "prompts": Format(
        _prompts, frozenset(), frozenset({"id", "prompt", "messages", "images", "image", "answer", "truth"})
    ),
    "trl": Format(_trl, frozenset({"chosen", "rejected"})),
    "llava": Format(_llava, frozenset({"conversations"})),
    "lrv": Format(_lrv, frozenset({"image_id", "question", "answer"})),
    "scigraphqa": Format(_scigraphqa, frozenset({"image_file", "q_a_pairs"})),
    "helpsteer": Format(_helpsteer, frozenset({"prompt", "response", *Attributes._fields}), joins_neighbours=True),
    "rlaif_v": Format(_rlaif_v, frozenset({"image", "question", "chosen", "rejected"})),
    "rlhf_v": Format(_rlhf_v, frozenset({"image", "text"})),
    "vlfeedback": Format(_vlfeedback, frozenset({"prompt", "completions", "img_path"})),
    "povid": Format(_povid, frozenset({"conversations", "rejected_conversations"})),
}


# What they share.


def _preference(messages: tuple[Message, ...], images: tuple[ImageSource, ...], chosen: str, rejected: str) -> Record:
    return Record(messages, images, judged=(JudgedAnswer(chosen, 1.0), JudgedAnswer(rejected, 0.0)), preference=True)


def _message(role: str, text: str, images: int = 0) -> Message:
    """A turn; each `<image>` in the text becomes an image part, and those it lacks come first."""
    pieces = text.split(IMAGE_PLACEHOLDER) if images else [text]
    if len(pieces) - 1 > images:
        raise ValueError(f"the text has {len(pieces) - 1} {IMAGE_PLACEHOLDER}, but there are {images} images")
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(images - len(pieces) + 1)]
    for index, piece in enumerate(pieces):
        content += [{"type": "image"}] if index else []
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    if not any(part["type"] == "text" for part in content):
        content.append({"type": "text", "text": ""})
    return {"role": role, "content": content}


def _user(text: str, images: int) -> tuple[Message, ...]:
    return (_message("user", text, images),)


def _conversation(turns: Any, images: int) -> tuple[tuple[Message, ...], str]:
    """LLaVA's turns as messages up to the last answer, and that answer."""
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("the conversation has no question with an answer")
    roles = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in roles:
            raise ValueError("a turn of the conversation has no 'from' that is human or gpt")
        role = roles[turn["from"]]
        first = role == "user" and not any(message["role"] == "user" for message in messages)
        messages.append(_message(role, _text(turn, "value"), images if first else 0))
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with an answer")
    answer = messages.pop()
    return tuple(messages), str(answer["content"][0]["text"])


def _messages(value: Any, images: int) -> tuple[Message, ...]:
    """Chat messages whose contents are texts or parts; Arrow fills missing keys with None, which are dropped."""
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of turns")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError("each message needs `role` and `content`")
        content = message["content"]
        if isinstance(content, str):
            messages.append(_message(message["role"], content, content.count(IMAGE_PLACEHOLDER)))
            continue
        if not isinstance(content, list) or any(
            not isinstance(part, dict) or part.get("type") not in ("text", "image") for part in content
        ):
            raise ValueError("message content must be text, or parts of type text or image")
        parts = [
            {"type": "image"}
            if part["type"] == "image"
            else {"type": "text", "text": _nonempty(part.get("text"), "text")}
            for part in content
        ]
        messages.append({"role": message["role"], "content": parts})
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders == 0 and images:  # TRL's text-only templates leave the picture to the `images` column
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * images + first["content"]
        placeholders = images
    if placeholders != images:
        raise ValueError(f"{placeholders} image parts in the messages but {images} images")
    if messages[-1]["role"] != "user":
        raise ValueError("the messages do not end with the user's turn")
    return tuple(messages)


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that chosen and rejected both begin with."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            raise ValueError("there is no 'prompt', and chosen and rejected do not begin alike")
        return chosen[:-1], chosen[-1:], rejected[-1:]
    raise ValueError("there is no 'prompt', and chosen and rejected are not conversations that begin alike")


def _answer_text(value: Any, name: str) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
        if isinstance(value, list):
            value = " ".join(part.get("text") or "" for part in value)
    return _nonempty(value, name)


def _trl_images(row: dict[str, Any], folder: Path) -> tuple[ImageSource, ...]:
    values = row.get("images")
    values = [values] if isinstance(values, str | dict) else values
    if values is None:
        values = [] if row.get("image") is None else [row["image"]]
    alike = sorted(name for name in row if re.match(r"(ima?ge?|picture|photo)s?($|_)", name) and row[name])
    if not values and alike:
        raise ValueError(f"{alike[0]!r} looks like pictures; call the column 'images'")
    return tuple(_image(value, folder) for value in values)


def _image(value: Any, folder: Path) -> ImageSource:
    """A picture as data sets hold it: a path, or what `datasets.Image` stores."""
    if isinstance(value, dict):
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise ValueError("the image is neither a path nor bytes")
    return folder / value


def _names(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("images must be file names")
    return names


def _text(row: dict[str, Any], name: str) -> str:
    return _nonempty(row.get(name), name)


def _nonempty(value: Any, name: str) -> str:
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a non-empty text")
    return value.strip()


def _optional_text(value: Any) -> str | None:
    return None if value is None else str(value)
