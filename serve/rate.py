"""How many requests a client may make."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_CLIENTS = 10_000


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
