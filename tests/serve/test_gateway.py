"""What clients see when an engine fails. Ray Serve's side of it is played here, for no real engine fails on cue."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from grpc import RpcError
from ray.exceptions import ActorUnavailableError

from serve.asgi import Head
from serve.gateway import EVENTS, TRIES, Gateway
from serve.settings import ServeSettings

HEAD, PIECE = Head(200, EVENTS, "base", "abc"), b'data: {"choices": []}\n\n'
ASKED = json.dumps({"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


class Answer:
    """A stream of messages, of which exceptions are raised."""

    def __init__(self, messages: list[Any]):
        self._messages = iter(messages)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = next(self._messages, None)
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        pass


class Handle:
    """A deployment's handle whose calls are answered one after another by what is given."""

    def __init__(self, *answers: list[Any]):
        self._answers = [Answer(messages) for messages in answers]
        self.asked = 0
        self.answer = self

    def options(self, stream: bool) -> "Handle":
        return self

    def remote(self, *_: Any) -> Answer:
        self.asked += 1
        return self._answers[self.asked - 1]


def ask(handle: Handle, folder: Path, full: bool = False, content: bytes = ASKED) -> httpx.Response:
    async def scene() -> httpx.Response:
        gateway = Gateway(ServeSettings(dir=str(folder)).model_dump(mode="json"), {"base": handle, "slot": handle}, [])  # type: ignore[dict-item]
        gateway.reconfigure({
            "ready": True, "routes": {"base": ["base", "", "base"]}, "aligned": "base", "candidate": None,
            "max_images": 1, "cards": {"base": {}},
        })  # fmt: skip
        if full:
            gateway._count("base", gateway._room)
        transport = httpx.ASGITransport(await gateway.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/chat/completions", content=content, headers=headers)

    return asyncio.run(scene())


def last_event(answer: httpx.Response) -> Any:
    return json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))


def logged(folder: Path) -> Any:
    return json.loads((folder / "access.log").read_text().splitlines()[-1])["status"]


@pytest.mark.parametrize("fault", [ValueError("secret"), TimeoutError(), KeyError("secret")])
@pytest.mark.parametrize("begun", [False, True])
def test_whatever_an_engine_raises_is_an_error_in_openais_shape(fault: Exception, begun: bool, tmp_path: Path) -> None:
    answer = ask(Handle([HEAD, PIECE, fault] if begun else [fault]), tmp_path)
    error = (last_event(answer) if begun else answer.json())["error"]
    assert (answer.status_code, error["code"]) == (200 if begun else 500, "engine_error")
    assert "secret" not in answer.text
    assert logged(tmp_path) == 500


@pytest.mark.parametrize("lost", [RpcError(), ActorUnavailableError("gone", None)])
def test_a_replica_lost_before_the_answer_is_replaced_and_after_it_said_so(lost: Exception, tmp_path: Path) -> None:
    handle = Handle([lost], [HEAD, PIECE])
    assert ask(handle, tmp_path).text == PIECE.decode()
    assert handle.asked == 2
    broken = ask(Handle([HEAD, PIECE, lost]), tmp_path)
    assert last_event(broken)["error"]["code"] == "replica_lost"
    handle = Handle(*([lost] for _ in range(TRIES)))
    given_up = ask(handle, tmp_path)
    assert (given_up.status_code, given_up.json()["error"]["code"], handle.asked) == (503, "replica_lost", TRIES)


@pytest.mark.parametrize(
    ("status", "body", "message", "code"),
    [
        (400, {"message": "too hot", "param": "temperature", "code": 400}, "too hot", "invalid_request"),
        (404, {"message": "gone", "param": "model", "code": "model_not_found"}, "gone", "model_not_found"),
        (500, {"message": "secret", "param": None, "code": 500}, "the engine failed; its log says why", "engine_error"),
        (500, "secret", "the engine failed; its log says why", "engine_error"),
    ],
)
def test_what_an_engine_refuses_is_said_in_openais_shape(
    status: int, body: Any, message: str, code: str, tmp_path: Path
) -> None:
    refused = [Head(status, "application/json", "base", "abc"), json.dumps({"error": body}).encode()]
    answer = ask(Handle(refused), tmp_path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["message"]) == (status, code, message)
    assert error["param"] == (body["param"] if status < 500 else None)
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error", 500: "server_error"}[status]
    assert logged(tmp_path) == status


def test_an_engine_that_fails_within_a_stream_ends_it_with_our_error(tmp_path: Path) -> None:
    fault = b'data: {"error": {"message": "secret", "type": "x", "param": null, "code": 400}}\n\ndata: [DONE]\n\n'
    answer = ask(Handle([HEAD, PIECE + fault]), tmp_path)
    assert answer.text.startswith(PIECE.decode())
    assert last_event(answer)["error"]["code"] == "engine_error"
    assert "secret" not in answer.text
    assert logged(tmp_path) == 500


def test_without_room_not_even_the_body_is_parsed_whatever_idle_slots_there_are(tmp_path: Path) -> None:
    refused = ask(Handle(), tmp_path, full=True, content=b"no JSON")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert refused.headers["retry-after"] == "2"
