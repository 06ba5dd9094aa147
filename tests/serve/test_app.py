"""Which engine is to hold which version, and what the gateway is told of it."""

from typing import Any

import pytest

from serve.app import BASE, Endpoint, engine_config, engine_names, gateway_table
from serve.settings import ServeSettings
from serve.versions import Candidate, Registry, Version


def registry(*versions: Version, promoted: tuple[str, ...], candidate: Candidate | None = None) -> Registry:
    base = Version("base", "/models/base", "000")
    return Registry(base, "float32", 128, 1, {one.name: one for one in versions}, promoted, candidate)


A, B = (Version(name, f"/models/{name}", name * 3) for name in "ab")
X = Version("x", "/adapters/x", "xxx", rank=8)


def endpoint(slots: int, max_rank: int = 0) -> Endpoint:
    engines = [BASE, *(f"slot-{number + 1}" for number in range(slots))]
    return Endpoint(ServeSettings(), {"engines": engines, "max_rank": max_rank})


def test_engines_for_whole_weights_are_started_only_if_there_are_any() -> None:
    settings = ServeSettings()
    assert engine_names(settings, registry(X, promoted=("x",))) == ["base"]
    assert engine_names(settings, registry(A, X, promoted=("a",))) == ["base", "slot-1"]


def test_an_engine_is_asked_for_as_much_as_the_gateway_lets_in() -> None:
    """Serve's own default is five requests at a time."""
    args = {"settings": ServeSettings().model_dump(), "model": "m", "precision": "float32", "max_length": 128}
    config = engine_config(BASE, args | {"max_images": 1, "max_rank": 8})
    assert config["deployment_config"]["max_ongoing_requests"] > 1000
    assert config["engine_kwargs"]["max_lora_rank"] == 8


def test_names_lead_to_engines_and_adapters() -> None:
    state = registry(A, X, promoted=("a",), candidate=Candidate("x", 0.25))
    found: dict[str, Any] = gateway_table(state, {"base": [state.base, X], "slot-1": [A], "slot-2": [state.base]})
    assert found["routes"] == {
        "base": ["base", "", "base"],
        "x": ["base", "x", "x"],
        "a": ["slot-1", "", "a"],
        "aligned": ["slot-1", "", "a"],
    }
    assert list(found["cards"]) == ["base", "aligned", "x", "a"]
    assert found["cards"]["aligned"]["revision"] == "aaa"
    assert found["candidate"] == {"version": "x", "share": 0.25}


def test_before_anything_is_promoted_aligned_is_the_base() -> None:
    state = registry(promoted=())
    assert gateway_table(state, {"base": [state.base]})["routes"]["aligned"] == ["base", "", "base"]


@pytest.mark.parametrize(
    ("state", "slots", "max_rank", "says"),
    [
        (registry(A, B, promoted=("a",), candidate=Candidate("b", 0.1)), 1, 0, "no engine for b; .* engine.slots=2"),
        (registry(A, promoted=("a",)), 0, 0, "no engine for a; .* engine.slots=1"),
        (registry(X, promoted=("x",)), 0, 0, "without room for the adapter x"),
    ],
)
def test_what_has_no_place_is_said_before_anything_is_changed(
    state: Registry, slots: int, max_rank: int, says: str
) -> None:
    import re

    assert re.search(says, endpoint(slots, max_rank).apply(state))
