"""The serving application: several models behind one OpenAI endpoint, on `ray.serve.llm`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.connect import cpu_engine_variables


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

    return build_openai_app({"llm_configs": [LLMConfig(**_llm_config(model)) for model in models]})


def run_app(models: Sequence[ServedModel], host: str, port: int) -> None:
    """Deploy the application on a running Ray cluster and return once it answers."""
    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    serve.run(build_app(models), name="raylign", route_prefix="/")


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
        "deployment_config": {"num_replicas": 1},
        "log_engine_metrics": False,
    }
    if model.gpus == 0:
        config["accelerator_config"] = {"kind": "cpu"}
        config["placement_group_config"] = {"bundles": [{"CPU": 0.5}]}
        config["runtime_env"] = {"env_vars": cpu_engine_variables(threads=1, cache_gib=1)}
    return config
