"""The serving application: a gateway and its engines on Ray Serve, deployed once and changed while they answer."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from typing import Any

from cluster.connect import ActorResources, Role, cpu_engine_variables
from cluster.errors import ClusterError
from serve.settings import EngineSettings, ServeSettings
from serve.versions import Registry, Version, stages

APP = "raylign"
GATEWAY = "gateway"
BASE = "base"
REPLICA_CPUS = 0.25
"""The part of an engine's CPUs that Ray Serve's replica reserves; vLLM gets the rest."""
GATEWAY_CPUS = 0.25
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""Of replicas: else a piece of an answer passes through two threads more. Nothing of ours blocks for long."""
MAX_ONGOING = 100_000
"""More than ever: the gateway itself counts what it lets in."""
START_TIMEOUT_S = 900.0
CHANGE_TIMEOUT_S = 900.0
ASK_TIMEOUT_S = 60.0


def roles(settings: ServeSettings, registry: Registry) -> list[Role]:
    """The actors that serving places."""
    engines = len(engine_names(settings, registry)) * settings.engine.replicas
    return [
        Role("engine", engines, settings.engine.resources),
        Role(GATEWAY, 1, ActorResources(cpus=GATEWAY_CPUS)),
    ]


def engine_names(settings: ServeSettings, registry: Registry) -> list[str]:
    """The base's engine, and slots for versions with weights of their own if there are any."""
    whole = any(not version.rank for version in registry.versions.values())
    return [BASE, *(f"slot-{number}" for number in range(1, settings.engine.slots + 1) if whole)]


def application(args: dict[str, Any]) -> Any:
    """Ray Serve's application from JSON arguments; named by `import_path` in what is deployed."""
    from ray import serve
    from ray.serve.llm import LLMConfig

    from serve.engine import Engine
    from serve.gateway import Gateway

    engines = {}
    for name in args["engines"]:
        config = LLMConfig(**engine_config(name, args))
        options = Engine.get_deployment_options(config)
        engines[name] = serve.deployment(Engine).options(**options, name=name).bind(config)
    gateway: Any = serve.deployment(serve.ingress()(Gateway)).options(
        name=GATEWAY,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": GATEWAY_CPUS, "runtime_env": {"env_vars": ONE_LOOP}},
    )
    return gateway.bind(args["settings"], engines, args["placeholders"])


def engine_config(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ray.serve.llm`'s LLMConfig for one engine."""
    settings = EngineSettings(**args["settings"]["engine"])
    on_cpu = settings.resources.gpus == 0
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": name, "model_source": args["model"]},
        "engine_kwargs": {
            "dtype": args["precision"],
            "max_model_len": args["max_length"],
            "max_num_seqs": settings.max_sequences,
            "limit_mm_per_prompt": {"image": args["max_images"]},
            "enforce_eager": on_cpu,
            "gpu_memory_utilization": settings.gpu_memory_fraction,
            "tensor_parallel_size": max(1, int(settings.resources.gpus)),
            # vLLM rewinds the generator of a seeded request whose prompt was cut; a CPU generator cannot.
            "enable_chunked_prefill": not on_cpu,
            "disable_log_stats": True,
            "log_error_stack": True,  # clients are not told what went wrong inside
        },
        "deployment_config": {
            "num_replicas": settings.replicas,
            "max_ongoing_requests": MAX_ONGOING,
            "ray_actor_options": {"num_cpus": REPLICA_CPUS},
            "health_check_period_s": 5,
        },
        "log_engine_metrics": False,
    }
    if name == BASE and args["max_rank"]:
        config["engine_kwargs"] |= {
            "enable_lora": True,
            "max_loras": settings.adapters,
            "max_cpu_loras": 2 * settings.adapters,  # old and new ones together, while names change
            "max_lora_rank": args["max_rank"],
        }
    variables = dict(ONE_LOOP)
    if on_cpu:
        config["accelerator_config"] = {"kind": "cpu"}
        config["placement_group_config"] = {"bundles": [{"CPU": max(0.0, settings.resources.cpus - REPLICA_CPUS)}]}
        variables |= cpu_engine_variables(settings.resources.threads, settings.cpu_cache_gib)
    config["runtime_env"] = {"env_vars": variables}
    return config


class Endpoint:
    """The running application, and the way to change what it serves."""

    def __init__(self, settings: ServeSettings, args: dict[str, Any]):
        self._settings = settings
        self._args = args
        self._slots: list[str | None] = [None] * (len(args["engines"]) - 1)
        self._holds: dict[str, list[Version]] = {}
        self._table: dict[str, Any] = {}
        self._serial = 0

    def apply(self, registry: Registry) -> str:
        """Serve what the registry wants: first the engines load it, then the names lead there, then the engines let go
        of what no name leads to.

        Returns why a version that is needed cannot be served, "" if nothing went wrong; then what was served before
        still is. Other versions that cannot be loaded are left out.
        """
        for slots in stages(registry, self._slots):
            if fault := self._change(registry, slots):
                return fault
        return ""

    @property
    def names(self) -> list[str]:
        """The models that can be asked for."""
        return list(self._table["cards"])

    def _change(self, registry: Registry, slots: list[str | None]) -> str:
        """Serve with these versions in the slots; returns as `apply` does."""
        fitting = [one for one in registry.wanted if 0 < one.rank <= self._args["max_rank"]]
        holds: dict[str, list[Version]] = {BASE: [registry.base, *fitting[: self._settings.engine.adapters]]}
        for number, name in enumerate(slots, start=1):
            holds[f"slot-{number}"] = [registry.versions[name]] if name else [registry.base]
        if fault := _unplaced(registry, holds):
            return fault
        table = self._table or gateway_table(registry, holds, ready=False)
        try:
            self._deploy({name: _union(versions, self._holds.get(name, ())) for name, versions in holds.items()}, table)
            if not self._table:
                _wait_until_running()
            faults = self._wait_for_engines()
            if fault := next((faults[one] for one in registry.needed if one in faults), ""):
                raise ClusterError(fault)
        except ClusterError as error:
            if self._table:
                self._deploy(self._holds, self._table)
            return str(error)
        for name, why in faults.items():
            print(f"{name} is not served: {why}", flush=True)
        holds = {name: [one for one in held if one.name not in faults] for name, held in holds.items()}
        self._slots, self._holds = slots, holds
        self._table = gateway_table(registry, holds)
        try:
            self._deploy(self._holds, self._table)
            self._wait_for(GATEWAY, "table", lambda found: found == self._table)
            self._wait_for_engines()
        except ClusterError as error:
            return str(error)
        return ""

    def _deploy(self, holds: dict[str, list[Version]], table: dict[str, Any]) -> None:
        """Only `user_config` ever differs, so Serve changes the running replicas instead of starting new ones."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self._serial += 1
        configs: dict[str, Any] = {
            name: {"serial": self._serial, "versions": [asdict(one) for one in versions]}
            for name, versions in holds.items()
        }
        configs[GATEWAY] = table
        app = {
            "name": APP, "route_prefix": "/", "import_path": "serve.app:application", "args": self._args,
            "deployments": [{"name": name, "user_config": config} for name, config in configs.items()],
        }  # fmt: skip
        http = {"host": self._settings.host, "port": self._settings.port}
        schema = ServeDeploySchema.model_validate({"applications": [app], "http_options": http})
        _get_global_client().deploy_apps(schema)

    def _wait_for_engines(self) -> dict[str, str]:
        """Wait until every replica took its last change; returns why versions could not be loaded, by their names."""
        faults: dict[str, str] = {}
        for name in self._args["engines"]:
            for _, _, found in self._wait_for(name, "state", lambda state: state[0] == self._serial):
                faults |= found
        return faults

    def _wait_for(self, deployment: str, method: str, reached: Callable[[Any], bool]) -> list[Any]:
        """Ask every replica until each answer is as wanted; returns the answers.

        Raises:
            ClusterError: that takes too long.
        """
        from grpc import RpcError
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        handle = serve.get_deployment_handle(deployment, APP)
        deadline = time.monotonic() + CHANGE_TIMEOUT_S
        while time.monotonic() < deadline:
            # A replica may be lost meanwhile, or be just changing, and then is not asked.
            with suppress(RayError, RayServeException, RpcError, TimeoutError):
                answers = handle.broadcast(method).results(timeout_s=ASK_TIMEOUT_S)
                if answers and all(map(reached, answers)):
                    return list(answers)
            time.sleep(0.2)
        raise ClusterError(f"{deployment} did not take a change within {CHANGE_TIMEOUT_S:.0f} s; see `serve status`")


def _union(versions: Sequence[Version], before: Sequence[Version]) -> list[Version]:
    """What an engine holds while names change: adapters old and new, but only the new weights of its own."""
    names = {version.name for version in versions}
    return [*versions, *(one for one in before if one.rank and one.name not in names)]


def _unplaced(registry: Registry, holds: dict[str, list[Version]]) -> str:
    """Why a version that must be served has no place; "" if all have one."""
    held = {version.name for versions in holds.values() for version in versions}
    missing = [name for name in registry.needed if name not in held]
    if not missing:
        return ""
    if registry.versions[missing[0]].rank:
        return f"the base's engine was started without room for the adapter {missing[0]}; start `raylign serve` again"
    slots = len(holds) - 1
    return f"there is no engine for {missing[0]}; start `raylign serve` again with engine.slots={slots + 1}"


def gateway_table(registry: Registry, holds: dict[str, list[Version]], ready: bool = True) -> dict[str, Any]:
    """The gateway's `user_config`: which names there are, where each leads, and whether the engines are there."""
    routes = {
        version.name: [engine, version.name if version.rank else "", version.name]
        for engine, versions in holds.items()
        for version in versions
        if engine == BASE or version.name != BASE
    }
    aligned = registry.aligned
    named = {BASE: registry.base, "aligned": aligned} | {n: registry.versions[n] for n in routes if n != BASE}
    candidate = registry.candidate
    return {
        "ready": ready,
        "routes": {**routes, "aligned": routes[aligned.name]},
        "aligned": aligned.name,
        "candidate": asdict(candidate) if candidate and candidate.version in routes else None,
        "max_images": registry.max_images,
        "cards": {name: card(name, version, registry) for name, version in named.items()},
    }


def card(name: str, version: Version, registry: Registry) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": version.created,
        "owned_by": "raylign",
        "parent": None if version.name == BASE else BASE,
        "max_model_len": registry.max_length,
        "max_images": registry.max_images,
        "version": version.name,
        "revision": version.revision,
        "step": version.step,
    }


@contextmanager
def running_app(settings: ServeSettings, registry: Registry, placeholders: list[str]) -> Iterator[Endpoint]:
    """Deploy the application on the Ray cluster that is connected; inside the block it answers. After it the
    application is gone, and so is the connection.

    Raises:
        ClusterError: it did not come up, or the cluster serves something already.
    """
    import ray
    from ray import serve

    for name in ("ray.serve", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        raise ClusterError(
            "Ray Serve runs on this cluster already, with an address of its own and perhaps other people's models; end "
            "it with `serve shutdown`, or leave cluster.address out to serve on a cluster of your own"
        )
    quiet = {"log_level": "ERROR", "enable_access_log": False}  # the gateway has an access log of its own
    args = {
        "settings": settings.model_dump(mode="json"),
        "engines": engine_names(settings, registry),
        "model": registry.base.folder,
        "precision": registry.precision,
        "max_length": registry.max_length,
        "max_images": registry.max_images,
        "max_rank": max((version.rank for version in registry.versions.values()), default=0),
        "placeholders": placeholders,
    }
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=quiet)
        endpoint = Endpoint(settings, args)
        if fault := endpoint.apply(registry):
            raise ClusterError(f"serving could not start: {fault}")
        yield endpoint
    finally:
        # Ray prints the end of its own actors as a fault, perhaps only after it: so the connection ends here too.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            try:
                serve.shutdown()
            finally:
                ray.shutdown()


def _wait_until_running() -> None:
    from ray import serve

    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        app = serve.status().applications.get(APP)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and app.status == "DEPLOY_FAILED":
            reasons = [one.message for one in app.deployments.values() if one.message] or [app.message]
            raise ClusterError(f"serving could not start: {reasons[0].strip().splitlines()[-1][:300]}")
        time.sleep(0.5)
    raise ClusterError(f"serving did not start within {START_TIMEOUT_S:.0f} s; `serve status` says what it waits for")
