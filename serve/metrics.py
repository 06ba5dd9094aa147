"""What the endpoint counts, in Prometheus' text format."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one gateway."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("raylign_requests", "Answered requests", ["version", "status"], registry=registry)
        self._seconds = Histogram(
            "raylign_request_seconds", "From admission to the end", ["version"], buckets=BUCKETS_S, registry=registry
        )
        self._first = Histogram(
            "raylign_first_piece_seconds", "To the first piece", ["version"], buckets=BUCKETS_S, registry=registry
        )
        self._refused = Counter("raylign_refused", "Requests that were not admitted", ["reason"], registry=registry)
        self._writing = Gauge("raylign_writing", "Answers under way or waiting", ["engine"], registry=registry)
        self._aligned = Gauge("raylign_aligned", "1 for the version behind `aligned`", ["version"], registry=registry)
        self._preferences = Counter("raylign_preferences", "Visitors' choices", ["choice"], registry=registry)

    def answered(self, version: str, status: int, seconds: float, first: float | None) -> None:
        """A request ended; `first` is when its first piece came."""
        self._requests.labels(version, status).inc()
        self._seconds.labels(version).observe(seconds)
        if first is not None:
            self._first.labels(version).observe(first)

    def writing(self, engine: str, answers: int) -> None:
        """An engine has that many answers to write."""
        self._writing.labels(engine).set(answers)

    def refused(self, reason: str) -> None:
        """A request was not admitted."""
        self._refused.labels(reason).inc()

    def preferred(self, choice: str) -> None:
        """A visitor chose."""
        self._preferences.labels(choice).inc()

    def serving(self, version: str) -> None:
        """Another version is behind `aligned`."""
        self._aligned.clear()
        self._aligned.labels(version).set(1)

    def render(self) -> tuple[bytes, int, dict[str, str], str]:
        """Content, status, headers and media type of a response."""
        return generate_latest(self._registry), 200, {}, CONTENT_TYPE_LATEST
