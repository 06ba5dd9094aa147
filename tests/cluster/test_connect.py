"""Joining Ray: reachable or refused, room or refused, within seconds."""

import os

import pytest

from cluster.connect import ActorResources, ClusterSettings, Role, connect, environment_variables, set_auth_mode
from cluster.errors import ClusterError


def test_an_unreachable_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"nothing answers at 127\.0\.0\.1:1"):
        connect(ClusterSettings(address="127.0.0.1:1"))


def test_the_auth_mode_is_always_set_and_a_person_s_choice_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores them
        monkeypatch.delenv(name)
    set_auth_mode(joining=True)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    set_auth_mode(joining=False)
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "a person's choice is kept"
    monkeypatch.delenv("RAY_AUTH_MODE")
    set_auth_mode(joining=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in environment_variables(), "runtime environments are shown by the dashboard"


def test_too_much_asked_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from cluster.connect import check_room

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    check_room([Role("rollout worker", 2, ActorResources(cpus=1.5))])
    with pytest.raises(ClusterError, match=r"asks for 4 CPU \(2 rollout worker x 2\).*has 3 of 4 CPU free"):
        check_room([Role("rollout worker", 2, ActorResources(cpus=2))])
    with pytest.raises(ClusterError, match=r"asks for 1 GPU .*has 0 of 0 GPU free"):
        check_room([Role("learner worker", 1, ActorResources(gpus=1))])
