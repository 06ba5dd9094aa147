"""The rate limit of each client, on a clock that the test moves."""

from serve import rate
from serve.rate import RateLimit, Turns


def test_a_minutes_worth_is_let_through_at_once_and_then_evenly() -> None:
    now = 0.0
    limit = RateLimit(60, clock=lambda: now)
    assert [limit.take("anna") for _ in range(60)] == [0] * 60
    assert limit.take("anna") == 1
    now = 1.0
    assert limit.take("anna") == 0
    assert limit.take("anna") == 1


def test_clients_do_not_share() -> None:
    limit = RateLimit(1, clock=lambda: 0.0)
    assert limit.take("anna") == 0
    assert limit.take("anna") == 60
    assert limit.take("ben") == 0


def test_what_is_kept_of_clients_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(rate, "MAX_CLIENTS", 2)
    limit = RateLimit(1, clock=lambda: 0.0)
    for client in ("a", "b", "c"):
        limit.take(client)
    assert limit.take("c") > 0
    assert limit.take("a") == 0, "forgotten, for it was silent longest"


def test_a_crowd_comes_back_in_turns() -> None:
    now = 0.0
    turns = Turns(places=4, seconds=2, clock=lambda: now)
    assert [turns.take() for _ in range(9)] == [2, 3, 3, 4, 4, 5, 5, 6, 6]
    now = 60.0
    assert turns.take() == 2
    assert max(turns.take() for _ in range(1000)) == 60
