"""The door of the endpoint: who may come in, what is taken, which version answers, and the demo page."""

import asyncio
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpc import RpcError
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve import requests
from serve.asgi import Head
from serve.errors import ApiError, from_engine, too_many
from serve.keys import KeyFile
from serve.metrics import Metrics
from serve.preferences import Preferences, Recorder
from serve.rate import RateLimit, Turns
from serve.requests import Asked
from serve.settings import LOOPBACK, ServeSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

TRIES = 3
RETRY_AFTER_S = 2
BODY_TIMEOUT_S = 60.0
ALIGNED = "aligned"
EVENTS = "text/event-stream"
ERROR_EVENT = b'data: {"error"'
"""In a stream of the engine; no text of an answer can look like it, for quotes within one are escaped."""
CLIENT_GONE = 499
LOG_BYTES, LOG_FILES = 20 * 2**20, 5
REMEMBER = "x-raylign-remember"
"""Set by the page: the answer may be chosen or refused later."""
PAGES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
logger = logging.getLogger(__name__)
access = logging.getLogger("raylign.access")


class Target(NamedTuple):
    """Where a name leads."""

    engine: str
    adapter: str
    """Of the engine's adapters; "" for its own weights."""
    version: str


class Gateway:
    """The only deployment that is asked over HTTP; it knows the engines, and from `user_config` what they hold."""

    def __init__(self, settings: dict[str, Any], engines: "dict[str, DeploymentHandle]", placeholders: list[str]):
        self.settings = ServeSettings(**settings)
        self._engines = engines
        self._placeholders = placeholders
        self._keys = KeyFile(self.settings.dir)
        self._rate = RateLimit(self.settings.limits.requests_per_minute)
        self._turns = Turns(self._room, RETRY_AFTER_S)
        self._open = 0
        """Requests that are being read, answered or waited for."""
        self._writing = dict.fromkeys(engines, 0)
        """Answers that each engine has been asked for and not ended."""
        self._preferences = Preferences(self.settings.dir)
        self.metrics = Metrics()
        self._table: dict[str, Any] = {}
        log = RotatingFileHandler(Path(self.settings.dir) / "access.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES)
        access.addHandler(log)
        access.setLevel(logging.INFO)
        access.propagate = False

    def reconfigure(self, table: dict[str, Any]) -> None:
        """Take a new table of names and versions; called by Serve when `user_config` changes."""
        self._table = table
        self.metrics.serving(table["aligned"])

    def table(self) -> dict[str, Any]:
        """The names and versions that are in force."""
        return self._table

    async def __serve_build_asgi_app__(self) -> Starlette:
        pages = [Route(path, _file(name), methods=["GET"]) for path, name in PAGES.items() if self.settings.page]
        return Starlette(
            routes=[
                *pages,
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/preferences", self.prefer, methods=["POST"]),
            ],
            exception_handlers={ApiError: _show_error, 404: _no_such_page, 405: _wrong_method, Exception: _unexpected},
        )

    async def health(self, request: Request) -> Response:
        """Whether requests are taken; needs no key and tells nothing else."""
        if self._table["ready"]:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "starting"}, 503, {"Retry-After": str(RETRY_AFTER_S)})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        self._admit(request)
        return Response(*self.metrics.render())

    async def models(self, request: Request) -> Response:
        """The names that can be asked for, each with the version behind it and the revision of its weights."""
        self._admit(request)
        return JSONResponse({"object": "list", "data": list(self._cards.values())})

    async def model(self, request: Request) -> Response:
        """One of these names."""
        self._admit(request)
        name = request.path_params["name"]
        if name not in self._cards:
            raise self._unknown(name)
        return JSONResponse(self._cards[name])

    async def chat(self, request: Request) -> Response:
        """An answer to a conversation with images."""
        client = self._admit(request)
        self._check_room()
        with self._reading():
            body = await self._body(request)
            most, images = self.settings.engine.max_sequences, self._table["max_images"]
            asked = await requests.chat(body, most, images, self._placeholders, self.settings.images)
        if request.headers.get(REMEMBER) and asked.fields.get("stream") and asked.choices == 1:
            asked = replace(asked, fields={**asked.fields, "return_token_ids": True, "logprobs": True}, remember=True)
        return await self._respond(client, "/v1/chat/completions", asked)

    async def completion(self, request: Request) -> Response:
        """A text that goes on from a prompt."""
        client = self._admit(request)
        self._check_room()
        with self._reading():
            body = await self._body(request)
            asked = requests.completion(body, self.settings.engine.max_sequences, self._placeholders)
        return await self._respond(client, "/v1/completions", asked)

    async def prefer(self, request: Request) -> Response:
        """A visitor's choice between two answers."""
        client = self._admit(request)
        with self._reading():
            choice = await self._preferences.choose(await self._body(request), client)
        self.metrics.preferred(choice)
        return JSONResponse({"object": "preference", "choice": choice})

    # Who and what is let in.

    def _admit(self, request: Request) -> str:
        """The client's name, if it may make a request now."""
        client = request.client.host if request.client else "unknown"
        if self.settings.asks_for_keys:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            owner = self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None
            if owner is None:
                self.metrics.refused("key")
                needed = "this API key is not valid" if key else "an API key is needed: Authorization: Bearer KEY"
                raise ApiError(
                    401, needed, "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            client = owner
        elif request.url.hostname not in LOOPBACK:  # a page elsewhere whose name was made to lead here
            self.metrics.refused("host")
            raise ApiError(403, "without API keys only loopback names are answered to", "wrong_host")
        if wait := self._rate.take(client):
            self.metrics.refused("rate")
            most = self.settings.limits.requests_per_minute
            raise too_many(f"more than {most} requests a minute; come back in {wait} s", wait, "rate_limit_exceeded")
        return client

    @property
    def _room(self) -> int:
        """Answers that one engine may be asked for at the same time."""
        engine = self.settings.engine
        return engine.replicas * engine.max_sequences + engine.max_waiting

    def _check_room(self) -> None:
        """Refuse before anything is parsed if no engine that a name leads to has room."""
        engines = {engine for engine, *_ in self._table["routes"].values()}
        if all(self._writing[engine] >= self._room for engine in engines):
            raise self._full()

    def _full(self) -> ApiError:
        self.metrics.refused("queue")
        return too_many("too many requests wait already; come back later", self._turns.take(), "overloaded")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While a request is read and its images are decoded; as many at a time as could be answered."""
        if self._open >= self._room * len(self._engines):
            raise self._full()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _body(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too large."""
        most = self.settings.limits.body_bytes
        too_large = ApiError(413, f"the request is over {most} bytes; send smaller images", "request_too_large")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json", "unsupported_media_type")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the request did not come within {BODY_TIMEOUT_S:g} s", "timeout") from None
        return bytes(body)

    # Which version answers.

    @property
    def _cards(self) -> dict[str, Any]:
        cards: dict[str, Any] = self._table["cards"]
        return cards

    def _route(self, name: str) -> tuple[Target, bool]:
        """Where a model's name leads, and whether that is the candidate in place of `aligned`."""
        routes, candidate = self._table["routes"], self._table["candidate"]
        if name == ALIGNED and candidate and random.random() < candidate["share"]:
            return Target(*routes[candidate["version"]]), True
        if name not in routes:
            raise self._unknown(name)
        return Target(*routes[name]), False

    def _unknown(self, name: str) -> ApiError:
        known = ", ".join(self._cards)
        return ApiError(404, f"there is no model {name!r}; there are {known}", "model_not_found", "model")

    # The answer.

    async def _respond(self, client: str, path: str, asked: Asked) -> Response:
        if not self._table["ready"]:
            later = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(503, "the engines are still starting", "starting", headers=later)
        began = time.monotonic()
        target, is_candidate = self._route(asked.model)
        if self._writing[target.engine] + asked.choices > self._room:
            raise self._full()
        entry = {"id": uuid.uuid4().hex, "client": client, "model": asked.model, "version": target.version}
        if self.settings.log_prompts:
            entry["prompt"] = asked.text
        answer = self._answer(target, path, asked, began + self.settings.limits.timeout_s)
        try:
            head = await anext(answer)
        except BaseException as error:
            await answer.aclose()
            self._ended(entry, error.status if isinstance(error, ApiError) else CLIENT_GONE, began, None)
            raise
        assert isinstance(head, Head)
        entry["version"] = head.version
        headers = {
            "x-raylign-answer": entry["id"],
            "x-raylign-version": head.version,
            "x-raylign-revision": head.revision,
            "x-raylign-candidate": str(is_candidate).lower(),
            "cache-control": "no-store",
        }
        recorder = Recorder(asked, head) if asked.remember else None
        pieces = self._watched(answer, head.status, began, entry, recorder)
        return StreamingResponse(pieces, head.status, headers, head.content_type)

    async def _watched(
        self,
        answer: "AsyncGenerator[Head | bytes]",
        status: int,
        began: float,
        entry: dict[str, Any],
        recorder: Recorder | None,
    ) -> AsyncIterator[bytes]:
        """The pieces of the body; what became of them is counted and logged, however they end."""
        first: float | None = None
        try:
            async for piece in answer:
                first = first or time.monotonic() - began
                assert isinstance(piece, bytes)
                if recorder:
                    recorder.see(piece)
                yield piece
            if recorder and (remembered := recorder.remembered()):
                self._preferences.remember(entry["id"], remembered)
        except ApiError as error:  # the head is out, so the error can only be an event
            status = error.status
            yield f"data: {json.dumps(error.body)}\n\n".encode()
        except (asyncio.CancelledError, GeneratorExit):
            status = CLIENT_GONE
            raise
        finally:
            await answer.aclose()
            self._ended(entry, status, began, first)

    def _ended(self, entry: dict[str, Any], status: int, began: float, first: float | None) -> None:
        seconds = time.monotonic() - began
        self.metrics.answered(entry["version"], status, seconds, first)
        access.info(json.dumps({**entry, "status": status, "seconds": round(seconds, 3)}))

    async def _answer(self, target: Target, path: str, asked: Asked, deadline: float) -> "AsyncGenerator[Head | bytes]":
        """The engine's answer: its head when the first piece is there, then the pieces of a stream as they come, or
        anything else whole. Until the head, another replica takes the place of one that is lost."""
        self._count(target.engine, asked.choices)
        try:
            for attempt in range(1, TRIES + 1):
                head: Head | None = None
                begun = False
                whole = bytearray()
                try:
                    async with aclosing(self._ask(target, path, asked, deadline)) as messages:
                        async for message in messages:
                            if isinstance(message, Head):
                                head = message
                                continue
                            assert head is not None
                            if not head.content_type.startswith(EVENTS):
                                whole += message
                                continue
                            if not begun:
                                begun = True
                                yield head
                            told, failed, fault = message.partition(ERROR_EVENT)
                            if told:
                                yield told
                            if failed:
                                raise self._refused(target, 500, b'{"error"' + fault.partition(b"\n")[0])
                    if head is not None and head.status >= 400:
                        raise self._refused(target, head.status, bytes(whole))
                    if not begun and head is not None:
                        yield head
                        yield bytes(whole)
                    return
                except ApiError:
                    raise
                except (RayActorError, TaskCancelledError, DeploymentUnavailableError, RpcError) as error:
                    logger.warning("%s has lost a replica: %s", target.engine, error)
                    if begun or attempt == TRIES:
                        lost = "the replica that wrote this answer was lost; ask again"
                        raise ApiError(503, lost, "replica_lost") from error
                except Exception as error:  # whatever the engine raised comes as it is
                    logger.exception("%s failed", target.engine)
                    raise ApiError(500, "the engine failed; its log says why", "engine_error") from error
        finally:
            self._count(target.engine, -asked.choices)

    @staticmethod
    def _refused(target: Target, status: int, body: bytes) -> ApiError:
        """What to say of an error that the engine answered with."""
        if status >= 500:
            logger.error("%s answered %d: %s", target.engine, status, body.decode(errors="replace"))
        return from_engine(status, body)

    def _count(self, engine: str, answers: int) -> None:
        self._writing[engine] += answers
        self.metrics.writing(engine, self._writing[engine])

    async def _ask(self, target: Target, path: str, asked: Asked, deadline: float) -> "AsyncGenerator[Head | bytes]":
        handle = self._engines[target.engine].options(stream=True)
        exactly = "" if asked.model == ALIGNED else target.version
        stream: Any = handle.answer.remote(path, json.dumps(asked.fields).encode(), target.adapter, exactly)
        ended = False
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline) as limit:
                        message = await anext(stream)
                except StopAsyncIteration:
                    ended = True
                    return
                except TimeoutError:
                    if not limit.expired():
                        raise
                    most = self.settings.limits.timeout_s
                    raise ApiError(504, f"the answer took longer than {most:g} s", "timeout") from None
                yield message
        finally:
            if not ended:
                stream.cancel()


def _file(name: str) -> "Callable[[Request], Awaitable[Response]]":
    """A route that answers with a file of the page, which may load nothing from anywhere else."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def answer(request: Request) -> Response:
        return FileResponse(Path(__file__).parent / "page" / name, headers=headers)

    return answer


def _show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


def _no_such_page(request: Request, error: Exception) -> Response:
    return _show_error(request, ApiError(404, f"there is nothing at {request.url.path}", "not_found"))


def _wrong_method(request: Request, error: Exception) -> Response:
    return _show_error(request, ApiError(405, f"{request.method} is not allowed here", "method_not_allowed"))


def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("while answering %s", request.url.path, exc_info=error)
    return _show_error(request, ApiError(500, "something went wrong; the server's log says what", "internal_error"))
