"""Join a Ray cluster or start a local one; know what it has before asking for it."""

import os
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from pydantic import Field

from cluster.errors import ClusterError, first_line
from cluster.settings import Settings

AuthMode = Literal["disabled", "token"]
CONNECT_TIMEOUT_S = 10.0
PLACEMENT_TIMEOUT_S = 20.0


class ClusterSettings(Settings):
    """Which Ray cluster to use. Every role says in its own section how many actors it wants, and of what size."""

    address: str | None = None
    """`auto` or host:port of a running cluster; left out, a job joins its own, and otherwise one is started here."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a cluster started here; all of the machine's if left out. Ignored when joining."""
    object_store_memory: int = Field(1 << 30, ge=80_000_000)
    """Bytes of shared memory for objects of a cluster started here. Ignored when joining."""


class ActorResources(Settings):
    """What one actor reserves in Ray."""

    cpus: float = Field(0.5, ge=0)
    """CPU cores reserved; it may use more threads than this when the others are idle."""
    gpus: float = Field(0.0, ge=0)
    """GPUs reserved."""
    threads: int = Field(2, ge=1)
    """CPU threads its numerical libraries use."""


@dataclass(frozen=True)
class Role:
    """One kind of actor in the plan of a run."""

    name: str
    count: int
    resources: ActorResources


def environment_variables() -> dict[str, str]:
    """What every process of a run must see: no usage reports, quiet libraries."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # not 2: how soon a learner's end, good or bad, is noticed
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # cheaper streams, guarded by the cluster's token if it has one
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**29),  # not 4 MB: requests have pictures
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # actors share cores; a thread that spins while it waits steals them
    }


def cpu_engine_variables(threads: int, cache_gib: int) -> dict[str, str]:
    """What a vLLM engine on a CPU must see, lest it bind every core, take half of the memory and want a compiler."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "OMP_NUM_THREADS": str(threads),
        "TORCH_COMPILE_DISABLE": "1",
    }


def connect(settings: ClusterSettings) -> None:
    """Join the cluster at `settings.address`, the one a job runs in, or start one on this machine's loopback.

    Ray's own ports are open on every network interface, so a cluster started here has no dashboard and asks for a
    token, made for this run and kept in memory only. One that is joined has its own mode, given by RAY_AUTH_MODE.

    Raises:
        ClusterError: nothing answers at the address within `CONNECT_TIMEOUT_S`.
    """
    os.environ.update(environment_variables())
    address = settings.address or os.environ.get("RAY_ADDRESS")
    address = None if address == "local" else address
    set_auth_mode(joining=address is not None)
    if address is not None and ":" in address:
        _check_reachable(address)
    import ray

    if ray.is_initialized():
        return
    if address is None:
        port = free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        ray.init(
            address="local",  # never a cluster that happens to run here
            num_cpus=settings.num_cpus,
            object_store_memory=settings.object_store_memory,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env=_runtime_env(f"127.0.0.1:{port}"),
            _node_ip_address="127.0.0.1",
        )
        return
    runtime_env = _runtime_env(_resolved(address) if address == "auto" else address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cluster.address: no Ray cluster at {address!r} ({first_line(error)}); start one with `ray start --head` "
            f"or leave cluster.address out to start one for this run; if it asks for a token, set RAY_AUTH_MODE=token "
            f"and RAY_AUTH_TOKEN"
        ) from error


def _runtime_env(address: str) -> dict[str, dict[str, str]]:
    """What the cluster's processes must see, its own address among it: Ray Train asks whether its controller lives, and
    without one may ask another cluster of this machine, which knows of none; then the workers lose their placement."""
    return {"env_vars": environment_variables() | {"RAY_ADDRESS": address}}


def _resolved(address: str) -> str:
    """host:port of the cluster that Ray finds by itself; as it is where there is none, for joining to refuse it."""
    import ray

    with suppress(ConnectionError, RuntimeError, ValueError):
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        address = str(ray.get_runtime_context().gcs_address)
        ray.shutdown()
    return address


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def set_auth_mode(joining: bool) -> None:
    """Settle RAY_AUTH_MODE where nobody has.

    A cluster that is joined is taken to ask for no token, as `ray start` leaves it; one that is started asks for
    one, made now unless the environment has one.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "disabled" if joining else "token")
    if mode == "token" and not joining and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def in_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_room(roles: list[Role]) -> None:
    """Raise at once, rather than wait for ever, if the cluster can never place the roles together.

    Raises:
        ClusterError: says what was asked for and what there is.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    asked = {
        "CPU": sum(role.count * role.resources.cpus for role in roles),
        "GPU": sum(role.count * role.resources.gpus for role in roles),
    }
    for kind, amount in asked.items():
        if amount > free.get(kind, 0) + 1e-9:
            plan = ", ".join(
                f"{role.count} {role.name} x {getattr(role.resources, kind.lower() + 's'):g}" for role in roles
            )
            raise ClusterError(
                f"the run asks for {amount:g} {kind} ({plan}), but the cluster has {free.get(kind, 0):g} of "
                f"{total.get(kind, 0):g} {kind} free: free some, add nodes, or ask for fewer or smaller workers"
            )
    _check_placement(roles)


def _check_placement(roles: list[Role]) -> None:
    """Sums may do where no single node has room for an actor: try the placement, and give it back."""
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = [{"CPU": role.resources.cpus, "GPU": role.resources.gpus} for role in roles for _ in range(role.count)]
    bundles = [{kind: amount for kind, amount in bundle.items() if amount > 0} for bundle in wanted]
    group = placement_group([bundle for bundle in bundles if bundle] or [{"CPU": 0.001}])
    try:
        if not group.wait(PLACEMENT_TIMEOUT_S):
            sizes = [(role, role.resources) for role in roles]
            plan = ", ".join(f"{role.count} {role.name} x {r.cpus:g} CPU and {r.gpus:g} GPU" for role, r in sizes)
            raise ClusterError(
                f"the cluster has enough in all for {plan}, but not every actor fits on one of its nodes; ask for "
                f"smaller workers or larger nodes"
            )
    finally:
        remove_placement_group(group)


def log_to_file(path: Path) -> None:
    """Send everything this process prints, its C libraries included, to a file; the console stays readable."""
    with suppress(OSError):  # another node may not share the folder; then Ray's own log files have the output
        path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


def _check_reachable(address: str) -> None:
    parsed = urlparse(address if "//" in address else f"//{address}")
    try:
        with socket.create_connection((parsed.hostname or "", parsed.port or 6379), timeout=CONNECT_TIMEOUT_S):
            return
    except OSError as error:
        raise ClusterError(
            f"cluster.address: nothing answers at {address} ({error}); check the address and that the cluster is up"
        ) from error
