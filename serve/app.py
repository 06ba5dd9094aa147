"""The serving application: several models behind one OpenAI endpoint, on `ray.serve.llm`."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.connect import ActorResources, Role, cpu_engine_variables
from cluster.errors import ClusterError

APP = "raylign"
ENGINE_CPUS = 0.75
REPLICA_CPUS = 0.25
"""The part of an engine's CPUs that Ray Serve's replica reserves; vLLM gets the rest."""
INGRESS_CPUS = 0.25
START_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class ServedModel:
    """One model behind the endpoint."""

    name: str
    """What clients ask for."""
    folder: str
    """Hugging Face model folder."""
    precision: str
    max_length: int
    """Tokens of prompt and completion together."""
    max_images: int
    gpus: int
    """GPUs of one replica; 0 serves on the CPU."""


def build_app(models: Sequence[ServedModel]) -> Any:
    """A Ray Serve application that answers OpenAI requests for each of `models` under its name."""
    from ray.serve.llm import LLMConfig, build_openai_app

    return build_openai_app(
        {
            "llm_configs": [LLMConfig(**_llm_config(model)) for model in models],
            "ingress_deployment_config": {"ray_actor_options": {"num_cpus": INGRESS_CPUS}},
        }
    )


def roles(models: Sequence[ServedModel]) -> list[Role]:
    """The actors that serving places."""
    engine = ActorResources(cpus=ENGINE_CPUS, gpus=max((model.gpus for model in models), default=0))
    return [Role("engine", len(models), engine), Role("ingress", 1, ActorResources(cpus=INGRESS_CPUS))]


@contextmanager
def running_app(models: Sequence[ServedModel], host: str, port: int) -> Iterator[None]:
    """Deploy the application on a running Ray cluster; inside the block it answers, after it is gone.

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
            "it with `serve shutdown`, or leave --address out to serve on a cluster of your own"
        )
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
    try:
        target = serve.RunTarget(build_app(models), name=APP, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running()
        yield
    finally:
        serve.shutdown()


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


def _llm_config(model: ServedModel) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": model.name, "model_source": model.folder},
        "engine_kwargs": {
            "dtype": model.precision,
            "max_model_len": model.max_length,
            "limit_mm_per_prompt": {"image": model.max_images},
            "enforce_eager": model.gpus == 0,
            "tensor_parallel_size": max(1, model.gpus),
        },
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": REPLICA_CPUS}},
        "log_engine_metrics": False,
    }
    if model.gpus == 0:
        config["accelerator_config"] = {"kind": "cpu"}
        config["placement_group_config"] = {"bundles": [{"CPU": ENGINE_CPUS - REPLICA_CPUS}]}
        config["runtime_env"] = {"env_vars": cpu_engine_variables(threads=1, cache_gib=1)}
    return config
