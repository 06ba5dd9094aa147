"""`raylign doctor`: what a person would be asked for when something does not work."""

import importlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from cluster.connect import ClusterSettings, connect, environment_variables
from cluster.errors import ClusterError, RaylignError
from jobs.cli import job_parser, run
from jobs.paths import run_address

JUDGE_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY")
MIN_FREE_GIB = 9


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and report; returns 0 if nothing essential is missing."""
    parser = job_parser("doctor", "Check what this machine has and lacks.")
    parser.add_argument("--address", help="Ray cluster to check, `auto` or host:port; left out, RAY_ADDRESS if set")
    parser.add_argument("--storage", default="runs", help="where runs will be written (default: runs)")
    options = parser.parse_args(arguments)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("versions", _versions),
        ("processors", lambda: f"{os.cpu_count()} CPU cores"),
        ("memory", _memory),
        ("gpus", _gpus),
        ("vllm", lambda: _importable("vllm")),
        ("deepspeed", lambda: _importable("deepspeed")),
        ("storage", lambda: _writable(run_address(options.storage))),
        ("ray", lambda: _ray(options.address)),
        ("judge key", _judge_keys),
    ]
    code = 0
    for name, check in checks:
        try:
            print(f"  ok    {name:11} {check()}", flush=True)
        except RaylignError as error:
            code = code or error.exit_code
            print(f"  FAIL  {name:11} {error}", flush=True)
        except Exception as error:  # a broken package can raise anything on import
            code = code or 1
            print(
                f"  FAIL  {name:11} {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                flush=True,
            )
    return code


def _versions() -> str:
    from rl.summary import package_versions

    return ", ".join(f"{name} {version}" for name, version in package_versions().items() if name != "python")


def _memory() -> str:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free < MIN_FREE_GIB:
        raise ClusterError(f"{free:.1f} GiB free, but the demo needs {MIN_FREE_GIB}; end other programs")
    return f"{free:.1f} GiB free of {psutil.virtual_memory().total / 2**30:.1f}"


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none; the CPU configs (demo.yaml) run without"


def _importable(name: str) -> str:
    os.environ.update(environment_variables())
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        module = importlib.import_module(name)
    return f"imports, version {module.__version__}"


def _writable(address: str) -> str:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(address)
    try:
        filesystem.makedirs(root, exist_ok=True)
        if "://" in address:
            filesystem.pipe_file(f"{root}/.raylign-doctor", b"")
            filesystem.rm(f"{root}/.raylign-doctor")
        else:
            tempfile.TemporaryFile(dir=Path(root)).close()
    except OSError as error:
        raise ClusterError(f"{address} is not writable ({error}); give another run.dir") from error
    return f"{address} is writable"


def _ray(address: str | None) -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "not set: token for a local cluster, disabled for one that is joined")
    if address is None and "RAY_ADDRESS" not in os.environ:
        return f"no cluster asked for, a local one will be started; RAY_AUTH_MODE {mode}"
    connect(ClusterSettings(address=address))
    import ray

    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    ray.shutdown()
    return f"{nodes} nodes, {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU; RAY_AUTH_MODE {mode}"


def _judge_keys() -> str:
    present = [name for name in JUDGE_KEYS if os.environ.get(name)]
    return f"{', '.join(present)} set (not shown)" if present else "none set; Gemini and other paid judges need one"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
