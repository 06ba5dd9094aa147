"""What visitors prefer: answers that were just given are remembered, and a choice between two becomes a pair."""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rl.store import RunFolder
from rl.types import Completion, Judgement, Pair, PairBatch, PairValues, Prompt
from serve.asgi import Head
from serve.errors import ApiError, malformed
from serve.requests import Asked

REMEMBERED = 500
REMEMBERED_BYTES = 256 * 2**20
MAX_REASON = 2000
SOURCE = "demo page"
JUDGE = "visitor"


class Preference(BaseModel):
    """What a visitor says of two answers to the same question."""

    model_config = ConfigDict(extra="forbid", strict=True)

    first: str
    """The request id of an answer."""
    second: str
    """That of another one."""
    choice: Literal["first", "second", "tie", "both_bad"]
    reason: str = Field("", max_length=MAX_REASON)


@dataclass(frozen=True)
class Remembered:
    """An answer that was given."""

    prompt: Prompt
    completion: Completion
    version: str
    revision: str

    @property
    def size(self) -> int:
        """Bytes of its pictures."""
        return sum(len(image.png) for image in self.prompt.images)


class Recorder:
    """Reads a streamed answer while it passes by, to remember it."""

    def __init__(self, asked: Asked, head: Head):
        self._asked = asked
        self._head = head
        self._pieces: list[bytes] = []

    def see(self, piece: bytes) -> None:
        """One more piece of the answer."""
        self._pieces.append(piece)

    def remembered(self) -> Remembered | None:
        """The whole answer; None if it was not answered to its end."""
        prompt = Prompt.make(self._asked.messages, self._asked.images, source=SOURCE)
        text, finish = "", None
        prompt_ids: list[int] = []
        token_ids: list[int] = []
        logps: list[float] = []
        for event in _events(b"".join(self._pieces)):
            prompt_ids = event.get("prompt_token_ids") or prompt_ids
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
                token_ids += choice.get("token_ids") or ()
                logps += [one["logprob"] for one in (choice.get("logprobs") or {}).get("content") or ()]
                finish = choice.get("finish_reason") or finish
        if finish is None or len(logps) != len(token_ids):
            return None
        completion = Completion(
            prompt.id, tuple(prompt_ids), tuple(token_ids), text.strip(), tuple(logps), 0, finish
        )  # fmt: skip
        return Remembered(prompt, completion, self._head.version, self._head.revision)


def _events(stream: bytes) -> Iterator[dict[str, Any]]:
    for line in stream.decode().split("\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


class Preferences:
    """The newest answers, and the choices between them: all in choices.jsonl, and as pairs in a folder that
    `raylign align` takes as an offline source."""

    def __init__(self, folder: str):
        self.folder = Path(folder) / "preferences"
        self._store = RunFolder(str(self.folder))
        self._answers: OrderedDict[str, Remembered] = OrderedDict()
        self._bytes = 0
        self._chosen: set[frozenset[str]] = set()
        self._storing = asyncio.Lock()

    def remember(self, request_id: str, answer: Remembered) -> None:
        """Keep an answer until its place, or its pictures' memory, is needed for newer ones."""
        self._answers[request_id] = answer
        self._bytes += answer.size
        while len(self._answers) > REMEMBERED or self._bytes > REMEMBERED_BYTES:
            forgotten, old = self._answers.popitem(last=False)
            self._bytes -= old.size
            self._chosen = {pair for pair in self._chosen if forgotten not in pair}

    async def choose(self, body: bytes, client: str) -> str:
        """Store a choice; returns it.

        Raises:
            ApiError: it is malformed, about answers that are not remembered, or was made before.
        """
        try:
            said = Preference.model_validate_json(body)
        except ValidationError as error:
            fault = error.errors()[0]
            raise malformed(".".join(map(str, fault["loc"])) or None, fault["msg"]) from None
        for name in (said.first, said.second):
            if name not in self._answers:
                raise ApiError(404, f"the answer {name!r} is not remembered any more; ask again", "answer_not_found")
        first, second = self._answers[said.first], self._answers[said.second]
        if said.first == said.second or first.prompt.id != second.prompt.id:
            raise ApiError(400, "the two answers must be different ones to the same question", "invalid_request")
        both = frozenset((said.first, said.second))
        if both in self._chosen:
            raise ApiError(409, "this choice was made already", "already_chosen")
        self._chosen.add(both)
        try:
            async with self._storing:
                await asyncio.to_thread(self._write, said, first, second, client)
        except OSError as error:
            self._chosen.discard(both)
            raise ApiError(507, "the choice could not be stored; say it again later", "not_stored") from error
        return said.choice

    def _write(self, said: Preference, first: Remembered, second: Remembered, client: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        step = None
        if said.choice in ("first", "second") and first.completion.text != second.completion.text:
            chosen, rejected = (first, second) if said.choice == "first" else (second, first)
            step = max(self._store.steps(), default=0) + 1
            self._store.write_batch(PairBatch(step, (_pair(chosen, rejected, said.reason),), step))
        line = {
            "time": round(time.time()), "client": client, "choice": said.choice, "reason": said.reason, "step": step,
            "prompt": first.prompt.id, "versions": [first.version, second.version],
            "answers": [first.completion.text, second.completion.text],
        }  # fmt: skip
        self._store.append_row("choices.jsonl", line)


def _pair(chosen: Remembered, rejected: Remembered, reason: str) -> Pair:
    judgements = PairValues(
        Judgement(1.0, None, f"{reason} ({chosen.version} {chosen.revision})".strip(), JUDGE, ""),
        Judgement(0.0, None, f"({rejected.version} {rejected.revision})", JUDGE, ""),
    )
    return Pair(
        chosen.prompt, PairValues(chosen.completion, rejected.completion), judgements, margin=1.0, source="offline",
        policy_version=0,
    )  # fmt: skip
