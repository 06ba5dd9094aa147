"""A judge behind an API: asks carefully, pays once, and never guesses.

An endpoint (gemini.py, openai_compatible.py) makes one call; everything that any of them needs is here: bounded
concurrency, rate limits, retries, the cache, the budget, and reading the reply.
"""

import asyncio
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from aiolimiter import AsyncLimiter
from pydantic import Field, SecretStr, model_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cluster.errors import ConfigError, JudgeError
from rl.images import CanonicalImage
from rl.judges.base import Judge, JudgeBase, all_ended
from rl.judges.cache import ReplyCache
from rl.judges.instructions import (
    GRADED,
    PAIRWISE,
    Part,
    digest,
    graded_parts,
    graded_schema,
    pairwise_parts,
    pairwise_schema,
    read_graded,
    read_pairwise,
)
from rl.types import Attributes, Completion, Judgement, Prompt, graded_score

CHARS_PER_TOKEN = 3.0
TOKENS_PER_IMAGE = 300
MAX_RETRY_AFTER_S = 120.0
FAILURES_IN_A_ROW = 10
PASSING_CODES = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which a later try may succeed."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class RemoteSettings(JudgeBase):
    """What every judge behind an API has."""

    model: str
    """Name of the judging model at the endpoint."""
    mode: Literal["graded", "pairwise"] = "graded"
    """`graded`: five attributes for all answers in one call; `pairwise`: every two answers compared, in both orders."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Of the judge's own sampling."""
    max_output_tokens: int = Field(2048, ge=16)
    """Longest reply."""
    concurrency: int = Field(16, ge=1)
    """Calls in flight at the same time."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Rate limit of the endpoint; none if left out."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Limit of input tokens, estimated before each call; none if left out."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest wait for one reply."""
    retries: int = Field(5, ge=0)
    """Further tries of a call that failed or whose reply cannot be read; then the judge abstains."""
    cache: str | None = "~/.cache/raylign/replies.sqlite"
    """File of paid replies, so that no question is paid for twice; none for no cache."""
    budget: float | None = Field(None, gt=0)
    """What judging may cost in this run, in the currency of the prices; the run stops cleanly when it is spent."""
    input_price: float = Field(0.0, ge=0)
    """Price of a million input tokens."""
    output_price: float = Field(0.0, ge=0)
    """Price of a million output tokens, thinking included."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.budget is not None and not (self.input_price or self.output_price):
            raise ConfigError("judge.budget needs judge.input_price and judge.output_price: without them nothing costs")
        return self

    def top_score(self, completions: int) -> float | None:
        return 12.0 if self.mode == "graded" else completions - 1.0


@dataclass(frozen=True)
class Request:
    """One question to the judging model."""

    instructions: str
    parts: tuple[Part, ...]
    schema: dict[str, Any]

    @property
    def input_tokens(self) -> int:
        """A guess, for the rate limit."""
        text = len(self.instructions) + sum(len(part) for part in self.parts if isinstance(part, str))
        images = sum(isinstance(part, CanonicalImage) for part in self.parts)
        return math.ceil(text / CHARS_PER_TOKEN) + TOKENS_PER_IMAGE * images

    @property
    def most_input_tokens(self) -> int:
        """More than it is likely to be, for the budget."""
        return 2 * self.input_tokens

    @property
    def content(self) -> list[str]:
        """The parts as text, an image as its digest."""
        return [part if isinstance(part, str) else f"image {part.digest}" for part in self.parts]


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0
    blocked: str | None = None
    """Why the endpoint would not answer this question, if it would not."""
    cut: bool = False
    """Whether it ended at `max_output_tokens`."""


class Unavailable(Exception):
    """The call failed in a way that may pass: busy, broken, or too slow."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds the endpoint asked to wait."""


class Unreadable(Exception):
    """The endpoint replied, but not with what was asked for."""

    def __init__(self, message: str, reply: Reply):
        super().__init__(message)
        self.reply = reply


class Endpoint(Protocol):
    """One way of calling a judging model."""

    key: SecretStr
    """Is taken out of whatever the endpoint says."""

    async def ask(self, request: Request) -> Reply:
        """One call, no retries.

        Raises:
            Unavailable: a later try may succeed.
            JudgeError: no try will: wrong key, unknown model, impossible request.
        """
        ...


class RemoteJudge(Judge):
    """Judges through an endpoint."""

    def __init__(self, name: str, settings: RemoteSettings, endpoint: Endpoint, address: str):
        """`address` tells endpoints apart that call their models the same."""
        super().__init__()
        self.name = f"{name}:{settings.model}"
        self.absolute = settings.mode == "graded"
        self._settings = settings
        self._address = address
        self._endpoint = endpoint
        self._cache = ReplyCache(Path(os.path.expanduser(settings.cache))) if settings.cache else None
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._requests = _limiter(settings.requests_per_minute, 1 / 60)
        self._tokens = _limiter(settings.tokens_per_minute, 1 / 2)
        self._in_flight = 0
        self._ended = asyncio.Event()
        self._reserved = 0.0
        """What the calls in flight may cost at most."""
        self._failures_in_a_row = 0
        self._refused: JudgeError | None = None
        self._stopped = asyncio.Event()

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """One judgement per completion; completions of the same text share one.

        Raises:
            JudgeError: see `Judge.grade`. What was paid for is in the cache.
        """
        judge = self._grade_group if self._settings.mode == "graded" else self._compare_group
        texts = [[one.text for one in answers] for answers in completions]
        # Once one is refused for good the others stop by themselves; those in flight still come and are kept.
        verdicts = await all_ended(judge(prompt, answers) for prompt, answers in zip(prompts, texts, strict=True))
        return [[by_text[one.text] for one in answers] for by_text, answers in zip(verdicts, completions, strict=True)]

    def stop(self) -> None:
        """See `Judge.stop`; the replies that still come are kept in the cache."""
        self._refuse(JudgeError("judge: stopped"))

    def _refuse(self, error: JudgeError) -> JudgeError:
        """Ask nothing more, and let no call wait for its next try."""
        self._refused = self._refused or error
        self._stopped.set()
        return self._refused

    async def _grade_group(self, prompt: Prompt, texts: list[str]) -> dict[str, Judgement]:
        """All answers of a prompt in one call, in an order that says nothing of who wrote them."""
        answers = list(dict.fromkeys(texts))
        random.Random(digest(answers)).shuffle(answers)
        request = Request(GRADED, tuple(graded_parts(prompt, answers)), graded_schema(len(answers)))
        try:
            grades = await self._ask(request, lambda text: read_graded(text, len(answers)))
        except _Abstention as abstention:
            return {answer: self._judgement(request, None, None, str(abstention)) for answer in answers}
        return {
            answer: self._judgement(request, graded_score(grade.attributes), grade.attributes, grade.reason)
            for answer, grade in zip(answers, grades, strict=True)
        }

    async def _compare_group(self, prompt: Prompt, texts: list[str]) -> dict[str, Judgement]:
        """Every two answers in both orders. The score is the share of the others that an answer beats, a tie half,
        times the number of other completions. An answer of which a comparison is missing has none."""
        answers = list(dict.fromkeys(texts))
        if len(answers) < 2:
            request = Request(PAIRWISE, tuple(pairwise_parts(prompt, "", "")), pairwise_schema())
            return {answer: self._judgement(request, None, None, "nothing to compare with") for answer in answers}
        pairs = list(itertools.combinations(answers, 2))
        requests = [
            Request(PAIRWISE, tuple(pairwise_parts(prompt, *order)), pairwise_schema())
            for first, second in pairs
            for order in ((first, second), (second, first))
        ]
        replies = await all_ended(self._verdict(request) for request in requests)
        points: dict[str, list[float]] = {answer: [] for answer in answers}
        reasons: dict[str, list[str]] = {answer: [] for answer in answers}
        both = zip(pairs, replies[::2], replies[1::2], strict=True)
        for (first, second), (forward, why), (backward, why_reversed) in both:
            for answer in (first, second):
                reasons[answer] += [why] if why == why_reversed else [why, why_reversed]
            if forward is None or backward is None:
                continue
            backward = {"A": "B", "B": "A"}.get(backward, backward)
            self.tally["order_checked"] += 1
            self.tally["order_consistent"] += forward == backward
            winner = forward if forward == backward else "tie"
            self.tally["order_ties"] += winner == "tie"
            points[first].append({"A": 1.0, "B": 0.0}.get(winner, 0.5))
            points[second].append(1.0 - points[first][-1])
        others = len(answers) - 1
        return {
            answer: self._judgement(
                requests[0],
                (len(texts) - 1) * sum(points[answer]) / others if len(points[answer]) == others else None,
                None,
                " / ".join(reasons[answer]),
            )
            for answer in answers
        }

    async def _verdict(self, request: Request) -> tuple[str | None, str]:
        try:
            reply = await self._ask(request, read_pairwise)
        except _Abstention as abstention:
            return None, str(abstention)
        return reply.verdict, reply.reason

    def _judgement(
        self, request: Request, score: float | None, attributes: Attributes | None, reason: str
    ) -> Judgement:
        return Judgement(score, attributes, reason, self.name, digest(request.instructions)[:12])

    async def _ask(self, request: Request, read: Callable[[str], T]) -> T:
        """The reply, from the cache or the endpoint, as `read` understands it.

        Raises:
            _Abstention: it was blocked, or did not come or could not be read in all tries.
        """
        settings = self._settings
        if self._cache is None:
            return await self._paid(request, read)
        key = digest(
            self._address, self.name, request.instructions, request.content, request.schema, settings.temperature,
            settings.max_output_tokens,
        )  # fmt: skip
        async with self._asking.setdefault(key, asyncio.Lock()):  # the same question twice at a time is paid for once
            known = self._cache.get(key)
            if known is not None:
                self.tally["cached"] += 1
                return _read_or_abstain(Reply(**known), read)
            return await self._paid(request, read, key)

    async def _paid(self, request: Request, read: Callable[[str], T], key: str | None = None) -> T:
        """The reply from the endpoint, in as many tries as are allowed; what came last is cached under `key`."""
        settings = self._settings
        retrying = AsyncRetrying(
            stop=stop_after_attempt(settings.retries + 1),
            wait=_wait,
            retry=retry_if_exception_type((Unavailable, Unreadable)),
            before_sleep=self._note_retry,
            sleep=self._sleep,
            reraise=True,
        )
        reply: Reply
        value: T | None
        try:
            reply, value = await retrying(self._try, request, read)
        except Unreadable as error:
            self.tally["unreadable"] += 1
            self._keep(key, error.reply)
            raise _Abstention(str(error)) from None
        except Unavailable as error:
            self.tally["failed"] += 1
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                raise self._refuse(
                    JudgeError(
                        f"judge: {self.name} failed {FAILURES_IN_A_ROW} times in a row, each after {settings.retries} "
                        f"retries ({error}); check the endpoint, then --resume: what was judged is kept"
                    )
                ) from None
            raise _Abstention(f"no reply after {settings.retries + 1} tries: {error}") from None
        self._failures_in_a_row = 0
        self._keep(key, reply)
        if reply.blocked is not None:
            self.tally["blocked"] += 1
            raise _Abstention(f"blocked: {reply.blocked}")
        assert value is not None
        return value

    def _keep(self, key: str | None, reply: Reply) -> None:
        if self._cache and key:
            self._cache.put(key, asdict(reply))

    async def _sleep(self, seconds: float) -> None:
        """The pause before another try; cut short once nothing more is to be asked."""
        if seconds > MAX_RETRY_AFTER_S:
            raise self._refuse(
                JudgeError(
                    f"judge: {self.name} asks to wait {seconds:.0f} s, perhaps for a daily limit; go on later with "
                    f"--resume: what was judged is kept"
                )
            )
        await self._unless_stopped(asyncio.sleep(seconds))

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Wait, but no longer once nothing more is to be asked."""
        tasks = [asyncio.ensure_future(one) for one in (waiting, self._stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _try(self, request: Request, read: Callable[[str], T]) -> tuple[Reply, T | None]:
        """One call within all limits; a blocked reply has no value."""
        async with self._slots:
            if self._requests:
                await self._unless_stopped(self._requests.acquire())
            if self._tokens:
                await self._unless_stopped(self._tokens.acquire(min(request.input_tokens, self._tokens.max_rate)))
            price = self._price(request.most_input_tokens, self._settings.max_output_tokens)
            while self._in_flight and self._overspends(price) and not self._refused:
                self._ended.clear()
                await self._unless_stopped(self._ended.wait())
            # From here to the call nothing waits, so that no other call can come between.
            if self._refused:
                raise self._refused
            if self._overspends(price):
                raise self._refuse(
                    JudgeError(
                        f"judge.budget: {self.cost:.4f} of {self._settings.budget:g} is spent, and the next call may "
                        f"cost {price:.4f}; what was judged is kept: raise the budget and go on with --resume"
                    )
                )
            self._reserved += price
            self._in_flight += 1
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    reply = await self._endpoint.ask(request)
            except TimeoutError:
                raise Unavailable(f"no reply within {self._settings.timeout_s:g} s") from None
            except Unavailable as error:
                raise Unavailable(self._redacted(error), error.retry_after) from None
            except JudgeError as error:
                raise self._refuse(JudgeError(self._redacted(error))) from None
            finally:
                self._reserved = max(0.0, self._reserved - price)
                self._in_flight -= 1
                self._ended.set()
                self.tally["calls"] += 1
            self.tally["input_tokens"] += reply.input_tokens
            self.tally["output_tokens"] += reply.output_tokens
            self.cost += self._price(reply.input_tokens, reply.output_tokens)
        if reply.blocked is not None:
            return reply, None
        return reply, _read(reply, read)

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        settings = self._settings
        return (input_tokens * settings.input_price + output_tokens * settings.output_price) / 1e6

    def _overspends(self, price: float) -> bool:
        """Whether a call of this price could, should those in flight cost what they may at most."""
        budget = self._settings.budget
        return budget is not None and self.cost + self._reserved + price > budget

    def _redacted(self, error: Exception) -> str:
        return str(error).replace(self._endpoint.key.get_secret_value(), "(the key)")

    def _note_retry(self, state: RetryCallState) -> None:
        self.tally["retries"] += 1
        error = state.outcome.exception() if state.outcome else None
        log.info("judge %s: try %d failed: %s", self.name, state.attempt_number, error)


class _Abstention(Exception):
    """The judge has no verdict; the text says why."""


_backoff = wait_random_exponential(multiplier=0.5, max=30)


def _wait(state: RetryCallState) -> float:
    """Full jitter on an exponential, but never less than the endpoint asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Unavailable) else None
    return max(_backoff(state), asked or 0.0)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What a Retry-After header asks for, in seconds from now, given as such or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _read_or_abstain(reply: Reply, read: Callable[[str], T]) -> T:
    if reply.blocked is not None:
        raise _Abstention(f"blocked: {reply.blocked}")
    try:
        return _read(reply, read)
    except Unreadable as error:
        raise _Abstention(str(error)) from None


def _read(reply: Reply, read: Callable[[str], T]) -> T:
    try:
        return read(reply.text)
    except ValueError as error:
        cut = " (it was cut: raise judge.max_output_tokens)" if reply.cut else ""
        raise Unreadable(f"{error}{cut}", reply) from None


def _limiter(per_minute: float | None, burst_share: float) -> AsyncLimiter | None:
    """At most `per_minute` in any sixty seconds, of which `burst_share` at once.

    A leaky bucket lets through its size and what leaks meanwhile, so that together they must be the limit.
    """
    if per_minute is None:
        return None
    if per_minute < 2:
        return AsyncLimiter(1, 60 / per_minute)
    burst = max(1.0, per_minute * burst_share)
    return AsyncLimiter(burst, 60 * burst / (per_minute - burst))
