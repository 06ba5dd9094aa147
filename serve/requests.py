"""What clients may ask: the fields of a request are checked here, before anything of it reaches an engine."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rl.images import CanonicalImage
from rl.types import Message
from serve.errors import ApiError
from serve.images import load_image
from serve.settings import ImageSettings

ROLES = ("system", "developer", "user", "assistant")
SAMPLING = {
    "model", "stream", "stream_options", "n", "seed", "stop", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "user", "ignore_eos",
    "min_tokens", "stop_token_ids", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids",
}  # fmt: skip
CHAT = SAMPLING | {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
COMPLETION = SAMPLING | {"prompt", "echo"}
MAX_MESSAGES = 1000
MAX_NESTED = 20_000
"""Lists and objects in a body; many empty ones take far more memory and time to read than they have bytes."""


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    fields: dict[str, Any]
    """As the engine is to get them, images as canonical data URLs."""
    messages: tuple[Message, ...] = ()
    """The conversation with bare image parts."""
    images: tuple[CanonicalImage, ...] = ()
    remember: bool = False
    """Whether the answer may be chosen or refused later."""

    @property
    def choices(self) -> int:
        """Answers that are written for it."""
        return int(self.fields.get("n", 1))

    @property
    def model(self) -> str:
        return str(self.fields["model"])

    @property
    def text(self) -> str:
        """What was asked, in words, for a log."""
        if "prompt" in self.fields:
            return str(self.fields["prompt"])
        parts = [part for message in self.messages for part in message["content"]]
        return " ".join(part["text"] for part in parts if part["type"] == "text")


def parse(body: bytes, allowed: Iterable[str], max_choices: int) -> dict[str, Any]:
    """The fields of a JSON body.

    Raises:
        ApiError: 400, it is no JSON object, or has unknown or impossible fields.
    """
    if body.count(b"[") + body.count(b"{") > MAX_NESTED:
        raise _refused(f"the body has more than {MAX_NESTED} lists and objects", None)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise _refused("the body is not valid JSON", None) from None
    if not isinstance(fields, dict):
        raise _refused("the body must be a JSON object", None)
    fields = {name: value for name, value in fields.items() if value is not None}
    if unknown := sorted(fields.keys() - set(allowed)):
        raise _refused(f"{unknown[0]} is not a parameter that is taken here", unknown[0])
    if not isinstance(fields.get("model"), str):
        raise _refused("model must name one of /v1/models", "model")
    count = fields.get("n", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= max_choices:
        raise _refused(f"n must be a whole number from 1 to {max_choices}", "n")
    stop = fields.get("stop", "")
    if not isinstance(stop, str) and not (
        isinstance(stop, list) and len(stop) <= 4 and all(isinstance(one, str) for one in stop)
    ):
        raise _refused("stop must be a text or a list of at most 4 texts", "stop")
    return fields


def completion(body: bytes, max_choices: int, placeholders: Sequence[str]) -> Asked:
    """A request for /v1/completions.

    Raises:
        ApiError: 400.
    """
    fields = parse(body, COMPLETION, max_choices)
    if not isinstance(fields.get("prompt"), str) or not fields["prompt"]:
        raise _refused("prompt must be a text that is not empty", "prompt")
    _check_text(fields["prompt"], placeholders, "prompt")
    return Asked(fields)


async def chat(
    body: bytes, max_choices: int, max_images: int, placeholders: Sequence[str], settings: ImageSettings
) -> Asked:
    """A request for /v1/chat/completions. Every image in it is checked and becomes what training would have seen.

    `placeholders` are the texts that stand for images in a prompt of the model.

    Raises:
        ApiError: 400.
    """
    fields = parse(body, CHAT, max_choices)
    given = fields.get("messages")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_MESSAGES:
        raise _refused(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    sent, kept = [], []
    images: list[CanonicalImage] = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _refused(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        # What clients send back of an answer has fields that stand empty.
        if unknown := sorted(name for name in message.keys() - {"role", "content", "name"} if message[name]):
            raise _refused(f"{where}.{unknown[0]} is not taken here", f"{where}.{unknown[0]}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise _refused(f"{where}.content must be a text or a list of parts", f"{where}.content")
        said = "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
        _check_text(said, placeholders, f"{where}.content")
        parts: list[dict[str, Any]] = []
        bare: list[dict[str, Any]] = []
        for number, part in enumerate(content):
            place = f"{where}.content[{number}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
                bare.append(parts[-1])
            elif kind == "image_url":
                if len(images) == max_images:
                    raise _refused(f"at most {max_images} images are taken in one request", place)
                url = part["image_url"].get("url") if isinstance(part.get("image_url"), dict) else None
                if not isinstance(url, str):
                    raise _refused(f"{place}.image_url.url must be a text", f"{place}.image_url.url")
                images.append(await load_image(url, settings, f"{place}.image_url.url"))
                parts.append({"type": "image_url", "image_url": {"url": images[-1].url}})
                bare.append({"type": "image"})
            else:
                raise _refused(f"{place} must be of type text or image_url", place)
        sent.append({"role": message["role"], "content": parts})
        kept.append({"role": message["role"], "content": bare})
    if given[-1]["role"] != "user":
        raise _refused("the last message must be the user's", "messages")
    return Asked({**fields, "messages": sent}, tuple(kept), tuple(images))


def _check_text(text: str, placeholders: Sequence[str], param: str) -> None:
    for placeholder in placeholders:
        if placeholder in text:
            raise _refused(f"the text holds {placeholder}, which stands for an image; take it out", param)


def _refused(message: str, param: str | None) -> ApiError:
    return ApiError(400, message, "invalid_request", param)
