"""How many requests a client may make, and when those that found no room come back."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_CLIENTS = 10_000
MAX_WAIT_S = 60.0
"""Longest that OpenAI's clients wait when they are told to."""


class RateLimit:
    """A bucket of tokens for each client, refilled evenly; a request takes one."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._rate = per_minute / 60
        self._most = float(per_minute)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> int:
        """0 if the client may make a request now, otherwise the seconds to wait for it."""
        now = self._clock()
        tokens, seen = self._buckets.pop(client, (self._most, now))
        tokens = min(self._most, tokens + (now - seen) * self._rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)  # the one that was silent longest
        return 0 if allowed else math.ceil((1 - tokens) / self._rate)


class Turns:
    """When clients that found no room come back: so many of them in each turn, lest a crowd comes back as one."""

    def __init__(self, places: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds = seconds
        self._between = seconds / places
        self._clock = clock
        self._last = -math.inf

    def take(self) -> int:
        """The seconds after which one more may come back."""
        now = self._clock()
        self._last = min(max(now + self._seconds, self._last + self._between), now + MAX_WAIT_S)
        return math.ceil(self._last - now)
