"""Joining Ray: reachable or refused, room or refused, within seconds."""

import os
import subprocess
import sys

import pytest

from cluster.connect import ClusterSettings, connect, environment_variables, set_auth_mode
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


def test_what_the_cluster_cannot_place_is_refused_with_what_there_is() -> None:
    """Two nodes of 2 CPUs each, in a process of their own."""
    code = """
from cluster import connect
from cluster.connect import ActorResources, ClusterSettings, Role
from cluster.errors import ClusterError
connect.PLACEMENT_TIMEOUT_S = 3
connect.set_auth_mode(joining=False)
from ray.cluster_utils import Cluster
nodes = Cluster()
for _ in range(2):
    nodes.add_node(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
connect.connect(ClusterSettings(address=nodes.address))
for count, cpus, gpus in ((2, 2.5, 0), (1, 1, 1), (1, 3, 0), (1, 0, 0), (2, 1.5, 0)):
    try:
        connect.check_room([Role("rollout worker", count, ActorResources(cpus=cpus, gpus=gpus))])
        print("placed", count, cpus)
    except ClusterError as error:
        print("refused", error)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    too_many, no_gpu, too_big, nothing, placed = done.stdout.splitlines()
    assert "asks for 5 CPU (2 rollout worker x 2.5)" in too_many
    assert "has 4 of 4 CPU free" in too_many
    assert "not every actor fits on one of its nodes" in too_big
    assert nothing == "placed 1 0"
    assert placed == "placed 2 1.5"
    assert "asks for 1 GPU" in no_gpu
    assert "has 0 of 0 GPU free" in no_gpu
