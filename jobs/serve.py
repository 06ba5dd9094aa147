"""`raylign serve RUN…`: the base and the aligned models of runs, to any OpenAI client, and a demo page."""

import errno
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cluster.connect import check_room, connect
from cluster.errors import ClusterError, ConfigError, DataError, first_line
from jobs.cli import job_parser, run
from jobs.config import load_config
from jobs.paths import run_address
from rl.adapters import ENGINE_RANKS
from rl.config import AlignConfig
from rl.policy import load_processor, merge_adapter, resolve_model
from serve.app import BASE, Endpoint, roles, running_app
from serve.keys import KeyFile
from serve.settings import ServeSettings
from serve.versions import REVISION_DIGITS, Registry, RegistryFile, Said, Version, weights_digest

WATCH_S = 1.0
DOOR_TIMEOUT_S = 60.0
ANNOUNCE_TIMEOUT_S = 1800.0


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and serve until Ctrl-C."""
    parser = job_parser(
        "serve", "Serve runs to OpenAI clients and on a page, until Ctrl-C. Each run is a version; the first one "
        "becomes `aligned` if nothing is yet, and `raylign promote` and `raylign rollback` change that meanwhile.",
        ServeSettings, positional=False,
    )  # fmt: skip
    options, settings = parse(parser, arguments)
    registry = RegistryFile(settings.dir)
    for folder in options.runs:
        check_run(run_address(folder))
    if not options.runs:
        registry.read()  # where nothing can be served nothing is left behind
    with registry.served():
        with registry.locked():
            for folder in options.runs:
                stored = registry.read() if registry.exists else None
                changed, version = register(stored, run_address(folder))
                if not changed.promoted:
                    changed = changed.promote(version.name)
                if changed != stored:
                    registry.write(changed, "registered", run=folder)
        serve(settings, registry)


def parse(parser: Any, arguments: Sequence[str], takes: str = "RUN | key=value") -> tuple[Any, ServeSettings]:
    """Options and settings of a command that `takes` runs, overrides of the serving config, or both."""
    parser.add_argument("runs", nargs="*", metavar=takes, help="the keys are fields of the config below")
    parser.add_argument("--config", help="YAML file with fields of `raylign serve`")
    options = parser.parse_intermixed_args(arguments)
    overrides = [one for one in options.runs if "=" in one]
    options.runs = [one for one in options.runs if "=" not in one]
    return options, serve_settings(options.config, overrides)


def serve_settings(config: str | None, overrides: Sequence[str]) -> ServeSettings:
    """The settings from a file, if there is one, and overrides; see `load_config`."""
    settings = load_config(ServeSettings, config, overrides)
    return settings.model_copy(update={"dir": run_address(settings.dir)})


def serve(settings: ServeSettings, file: RegistryFile) -> NoReturn:
    """Serve what the registry wants, and follow it when it changes, until Ctrl-C."""
    registry = file.read()
    if settings.asks_for_keys and not KeyFile(settings.dir).names():
        raise ConfigError(
            f"{settings.host} asks for API keys, but there is none; make one with "
            f"`raylign keys add NAME dir={settings.dir}`"
        )
    check_port(settings)
    placeholder = getattr(load_processor(registry.base.folder), "image_token", None)
    connect(settings.cluster)
    check_room(roles(settings, registry))
    print("starting the engines; this takes about a minute on a CPU", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    with running_app(settings, registry, [placeholder] if placeholder else []) as endpoint:
        check_door(settings)
        if settings.page:
            print(f"page: {address(settings)}/", flush=True)
        print(f"serving {', '.join(endpoint.names)} at {address(settings)}/v1 until Ctrl-C", flush=True)
        follow(file, endpoint, registry)


def _stop(*_: Any) -> None:
    """On the first signal everything ends as it should, on the next one at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    print("stopping; this takes some seconds (again to abort)", flush=True)
    raise KeyboardInterrupt


def follow(file: RegistryFile, endpoint: Endpoint, registry: Registry) -> NoReturn:
    """Apply each change of the registry, and say beside it which one is in force."""
    file.say(Said(registry.serial, ""))
    while True:
        time.sleep(WATCH_S)
        if (found := file.read()).serial != registry.serial:
            registry = found
            fault = endpoint.apply(registry)
            file.say(Said(registry.serial, fault))
            print(fault or registry, flush=True)


def announce(file: RegistryFile, before: Registry) -> int:
    """Wait until a running server serves what the registry now wants; returns the exit code.

    Raises:
        ClusterError: it cannot, so the registry is as `before` again.
    """
    wanted = file.read()
    deadline = time.monotonic() + ANNOUNCE_TIMEOUT_S
    if file.is_served and file.said is None:
        print("the server is still starting; this waits for it", flush=True)
    while time.monotonic() < deadline:
        if not file.is_served:
            print(f"{wanted}; no server is running, and the next one will serve it")
            return 0
        said = file.said
        if said and said.serial >= wanted.serial and said.fault:
            with file.locked():
                if file.read() == wanted:  # nobody has changed it since
                    file.write(replace(before, serial=wanted.serial), "taken back", fault=said.fault)
            raise ClusterError(f"the server cannot serve it, so nothing was changed: {said.fault}")
        if said and said.serial >= wanted.serial:
            print(f"{wanted}; the server serves it")
            return 0
        time.sleep(WATCH_S / 5)
    raise ClusterError(f"the server did not take the change within {ANNOUNCE_TIMEOUT_S:.0f} s; look at what it prints")


def address(settings: ServeSettings) -> str:
    """Where this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def check_port(settings: ServeSettings) -> None:
    """Ray Serve would share a port with another Ray Serve, and each would get some of the requests.

    Raises:
        ConfigError: something listens there already.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port: {settings.port} of {settings.host} is taken; give another, port=…") from None


def check_door(settings: ServeSettings) -> None:
    """A server that asks for keys must refuse whoever has none.

    Raises:
        ClusterError: it does not, or does not answer.
    """
    import httpx

    url = f"{address(settings)}/v1/models"
    try:
        status = httpx.get(url, timeout=DOOR_TIMEOUT_S, trust_env=False).status_code
    except httpx.HTTPError as error:
        raise ClusterError(f"{url} does not answer ({first_line(error)}); is host={settings.host} right?") from error
    expected = 401 if settings.asks_for_keys else 200
    if status != expected:
        raise ClusterError(f"{url} answers {status} without a key, but {expected} was expected; nothing is served")


def check_run(folder: str) -> AlignConfig:
    """The config of a run that has a model.

    Raises:
        DataError: the folder is no run, or its model was not written yet.
    """
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise DataError(f"{folder} is no run folder (no config.yaml); give the run.dir of a finished run")
    if not (path / "model").is_dir():
        raise DataError(f"{folder} has no model yet; let the run finish, or go on with it by --resume")
    return load_config(AlignConfig, str(path / "config.yaml"), [])


def register(registry: Registry | None, folder: str) -> tuple[Registry, Version]:
    """The registry with the model of a run as a version, and that version.

    Raises:
        DataError: it is no run with a model, or it was made from another base.
    """
    config = check_run(folder)
    path = Path(folder)
    model = path / "model"
    base = model_folder(config.policy.model)
    base_revision = weights_digest(base)
    rank = 0
    if config.policy.lora is not None:
        described = json.loads((model / "adapter_config.json").read_text())
        if described["use_dora"]:  # vLLM refuses it
            model = merge_adapter(base, model, path / "merged", config.policy.precision)
        else:
            rank = next(one for one in ENGINE_RANKS if one >= described["r"])
    revision = weights_digest(str(model))
    if registry is None:
        registry = Registry(
            base=Version(BASE, base, base_revision, created=int(time.time())),
            precision=config.policy.precision,
            max_length=config.policy.max_length,
            max_images=config.rollout.max_images,
        )
    if registry.base.revision != base_revision:
        raise DataError(
            f"{folder} was made from {base}, but what is served is made from {registry.base.folder}, which has other "
            f"weights; serve it from a folder of its own, dir=…"
        )
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-") or "run"
    name = f"{slug}-{revision[: REVISION_DIGITS // 2]}"
    if name in registry.versions:
        return registry, registry.versions[name]
    summary = path / "summary.json"
    step = json.loads(summary.read_text())["policy_version"] if summary.is_file() else 0
    version = Version(name, str(model), revision, str(path), rank, step, int(time.time()))
    return replace(registry, versions={**registry.versions, name: version}), version


def model_folder(model: str) -> str:
    """The folder of a model; one of the hub is downloaded if need be."""
    resolved = resolve_model(model)
    if Path(resolved).is_dir():
        return resolved
    from huggingface_hub import snapshot_download

    return str(snapshot_download(resolved))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
