"""The fields of a request: what is passed on, and what is refused before an engine sees it."""

import asyncio
import base64
import json
from typing import Any

import pytest

from serve.errors import ApiError
from serve.requests import Asked, chat, completion
from serve.settings import ImageSettings
from tests.conftest import make_prompt

PICTURE = make_prompt().images[0]
URL = f"data:image/png;base64,{base64.b64encode(PICTURE.png).decode()}"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "What do you see?"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def ask(**fields: Any) -> Asked:
    body = json.dumps({"model": "aligned", "messages": [user(IMAGE, TEXT)], **fields}).encode()
    return asyncio.run(chat(body, max_choices=4, max_images=1, placeholders=["<image>"], settings=ImageSettings()))


def test_a_conversation_is_passed_on_with_canonical_images() -> None:
    asked = ask(temperature=0, stream=True, stop=None)
    assert asked.model == "aligned"
    assert asked.fields == {"model": "aligned", "temperature": 0, "stream": True, "messages": [user(IMAGE, TEXT)]}
    assert asked.images == (PICTURE,)
    assert asked.messages == (user({"type": "image"}, TEXT),)
    assert asked.text == "What do you see?"


def test_what_a_client_sends_back_of_an_answer_is_taken() -> None:
    answer = {"role": "assistant", "content": "a circle", "refusal": None, "annotations": [], "tool_calls": None}
    asked = ask(messages=[user(TEXT), answer, user(TEXT)])
    assert asked.fields["messages"][1] == {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]}


def test_a_placeholder_is_found_in_what_the_parts_make_together() -> None:
    halves = [{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}]
    with pytest.raises(ApiError, match="stands for an image"):
        ask(messages=[user(*halves)])


def test_a_bare_text_is_a_part_and_a_name_is_dropped() -> None:
    asked = ask(messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "me"}])
    assert asked.fields["messages"][1] == user({"type": "text", "text": "hi"})


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "a list of 1 to 1000"),
        ({"messages": "hi"}, "messages", "a list of 1 to 1000"),
        ({"messages": [{"role": "martian", "content": "hi"}]}, "messages[0].role", "must be one of system"),
        ({"messages": ["hi"]}, "messages[0].role", "must be one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not taken"),
        ({"messages": [user(TEXT), {"role": "assistant", "content": "x"}]}, "messages", "must be the user's"),
        ({"messages": [user(IMAGE, IMAGE, TEXT)]}, "messages[0].content[1]", "at most 1 images"),
        ({"messages": [user({"type": "image_embeds", "image_embeds": "AAAA"})]}, "messages[0].content[0]", "type text"),
        ({"messages": [user({"type": "image_url", "image_url": "x"})]}, "messages[0].content[0].image_url.url", "text"),
        ({"messages": [user({"type": "text", "text": 3})]}, "messages[0].content[0]", "type text"),
        ({"messages": [user({"type": "text", "text": "a <image>"})]}, "messages[0].content", "stands for an image"),
        ({"model": 3}, "model", "/v1/models"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": True}, "n", "from 1 to 4"),
        ({"chat_template": "x"}, "chat_template", "not a parameter"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs", "not a parameter"),
        ({"prompt": "x"}, "prompt", "not a parameter"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 15_000, b"[" + b"[]," * 20_000 + b"[]]", b"3"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body"):
        completion(body, 4, [])


def test_a_completion_takes_a_text_and_no_token_ids() -> None:
    asked = completion(b'{"model": "base", "prompt": "copy: a b", "echo": true}', 4, ["<image>"])
    assert (asked.text, asked.fields["echo"]) == ("copy: a b", True)
    for prompt in ("", [1, 2], "<image>", None):
        with pytest.raises(ApiError, match=r"prompt|stands for an image"):
            completion(json.dumps({"model": "base", "prompt": prompt}).encode(), 4, ["<image>"])
