"""Asking an ASGI application of the own process, and how an engine's answer begins."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

LEAVE_TIMEOUT_S = 5.0
logger = logging.getLogger(__name__)


class Head(NamedTuple):
    """How an engine's answer begins; pieces of its body follow."""

    status: int
    content_type: str
    version: str
    """Name of the version that answers."""
    revision: str


async def run_asgi(
    app: Any, path: str, body: bytes, pause: Callable[[], float]
) -> AsyncGenerator[tuple[int, str] | bytes]:
    """POST a JSON body to an ASGI application of this process: yields (status, content type), then pieces of the body
    as they come, but what comes within `pause()` seconds after one goes out as one. Closing the iterator tells the
    application that the client is gone."""
    waiting: list[dict[str, Any]] = []
    news, gone = asyncio.Event(), asyncio.Event()
    asked = ended = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal ended
        ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        waiting.append(message)
        news.set()

    task = asyncio.create_task(app(_scope(path, len(body)), receive, send))
    task.add_done_callback(lambda _: news.set())
    try:
        while not task.done() or waiting:
            await news.wait()
            news.clear()
            messages = waiting.copy()
            waiting.clear()
            for message in messages:
                if message["type"] == "http.response.start":
                    yield message["status"], dict(message["headers"]).get(b"content-type", b"").decode()
            if piece := b"".join(message.get("body", b"") for message in messages):
                yield piece
                await asyncio.wait({task}, timeout=pause())
        if (fault := task.exception()) is not None:
            if not ended:
                raise fault
            logger.error("after its answer, %s raised", path, exc_info=fault)
    finally:
        gone.set()  # the application ends what it began, and only if it does not is it cancelled
        await asyncio.wait({task}, timeout=LEAVE_TIMEOUT_S)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE_TIMEOUT_S)


def _scope(path: str, length: int) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode()), (b"host", b"engine")]
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": headers, "client": ("127.0.0.1", 0), "server": ("engine", 80), "state": {},
    }  # fmt: skip
