"""Asking an application inside the process: order, bundling, and what it learns of a client that leaves."""

import asyncio
from typing import Any

import pytest

from serve import asgi
from serve.asgi import run_asgi


async def collect(app: Any, body: bytes = b"{}", pause: float = 0.0) -> list[Any]:
    async with asyncio.timeout(20):
        return [message async for message in run_asgi(app, "/v1/x", body, lambda: pause)]


def answering(*pieces: bytes) -> Any:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        asked = await receive()
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        for piece in (*pieces, asked["body"]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def test_the_head_comes_first_and_what_is_ready_comes_as_one() -> None:
    assert asyncio.run(collect(answering(b"a", b"b"), b"c")) == [(201, "text/plain"), b"abc"]


@pytest.mark.parametrize(("pause", "pieces"), [(0.0, [b"a", b"b", b"{}"]), (3600.0, [b"a", b"b{}"])])
def test_what_comes_soon_after_a_piece_goes_out_as_one_and_the_end_at_once(pause: float, pieces: list[bytes]) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_slowly(message: dict[str, Any]) -> None:
            await send(message)
            for _ in range(20):  # long enough for a piece to be on its way
                await asyncio.sleep(0)

        await answering(b"a", b"b")(scope, receive, send_slowly)

    assert asyncio.run(collect(app, pause=pause)) == [(201, "text/plain"), *pieces]


def test_what_goes_wrong_inside_is_raised() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(collect(app))


def test_a_fault_after_the_answer_is_complete_does_not_spoil_it() -> None:
    """Starlette answers 500 and then raises what went wrong."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answering(b"sorry")(scope, receive, send)
        raise ValueError("no")

    assert asyncio.run(collect(app)) == [(201, "text/plain"), b"sorry{}"]


@pytest.mark.parametrize("listens", [True, False])
def test_an_application_whose_client_leaves_is_told_and_ended(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "LEAVE_TIMEOUT_S", 30 if listens else 0.01)
    ended = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        try:
            if listens:
                assert (await receive())["type"] == "http.disconnect"
            else:
                await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def leave() -> None:
        messages = run_asgi(app, "/v1/x", b"{}", lambda: 0.0)
        assert await anext(messages) == (200, "")
        assert (await anext(messages)).startswith(b"x")  # type: ignore[union-attr]
        await messages.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert ended == [True]
