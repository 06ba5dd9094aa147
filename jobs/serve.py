"""`raylign serve RUN`: the base and the aligned model of a run, to any OpenAI client."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster.connect import ClusterSettings, check_room, connect
from cluster.errors import DataError
from jobs.cli import job_parser, run
from jobs.config import load_config
from jobs.paths import run_address
from rl.config import AlignConfig
from rl.policy import merge_adapter, resolve_model
from serve.app import ServedModel, roles, running_app


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and serve until Ctrl-C; returns the exit code."""
    parser = job_parser("serve", "Serve the models `base` and `aligned` of a run to OpenAI clients, until Ctrl-C.")
    parser.add_argument("run", help="folder of a finished run, for example runs/demo")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port on loopback (default: 8000)")
    parser.add_argument("--address", help="Ray cluster to serve on; left out, one is started here")
    options = parser.parse_args(arguments)
    models = served_models(run_address(options.run))
    connect(ClusterSettings(address=options.address))
    check_room(roles(models))
    print("starting two engines; this takes about a minute on a CPU", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set() if not stop.is_set() else os._exit(130))
    with running_app(models, "127.0.0.1", options.port):
        names = " and ".join(model.name for model in models)
        print(f"serving {names} at http://127.0.0.1:{options.port}/v1 until Ctrl-C", flush=True)
        while not stop.wait(1):
            pass
        print("stopping", flush=True)
    return 130


def served_models(folder: str) -> list[ServedModel]:
    """The base and the aligned model of a run.

    Raises:
        DataError: the folder is no run, or its model was not written yet.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise DataError(f"{folder} is no run folder (no config.yaml); give the run.dir of a finished run")
    config = load_config(AlignConfig, str(path / "config.yaml"), [])
    aligned = path / "model"
    if not aligned.is_dir():
        raise DataError(f"{folder} has no model yet; let the run finish, or go on with it by --resume")
    base = resolve_model(config.policy.model)
    if config.policy.lora is not None:
        aligned = merge_adapter(base, aligned, path / "merged", config.policy.precision)
    return [
        ServedModel(
            name=name,
            folder=model,
            precision=config.policy.precision,
            max_length=config.policy.max_length,
            max_images=config.rollout.max_images,
            gpus=int(config.rollout.resources.gpus),
        )
        for name, model in (("base", base), ("aligned", str(aligned)))
    ]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
