"""Real Ray with its job server, started once; runs of the real `raylign` command on it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl.store import RunFolder
from rl.types import Pair

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RUN_LIMIT_S = 400
HEAD_TRIES = 3

SMALL: dict[str, Any] = {
    "loop": {"steps": 3, "prompts_per_step": 16, "eval_every": 3, "checkpoint_every": 2},
    "policy": {"max_length": 128},
    "data": {"kind": "world", "prompts": 120, "heldout_scenes": 12},
    "rollout": {"sampling": {"completions": 4, "temperature": 1.5, "max_tokens": 48}},
    "learner": {"optimizer": {"learning_rate": 1e-4}},
}


def environment() -> dict[str, str]:
    """What a person's shell has, with this interpreter's programs first on the PATH."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    output: str


@dataclass(frozen=True)
class Cluster:
    """A running head node."""

    address: str
    dashboard: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def raylign(*arguments: str, limit: float = RUN_LIMIT_S, cwd: Path = ROOT) -> Outcome:
    """Run the command to its end."""
    done = subprocess.run(
        [str(BIN / "raylign"), *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    return Outcome(done.returncode, done.stdout)


def start(*arguments: str, joining: bool = True) -> "subprocess.Popen[str]":
    """Start the command as a shell does, in a process group of its own, and return at once.

    Where it does not join a cluster, nothing is said of RAY_AUTH_MODE either.
    """
    env = environment()
    if not joining:
        del env["RAY_AUTH_MODE"]
    return subprocess.Popen(
        [str(BIN / "raylign"), *arguments],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: "subprocess.Popen[str]", text: str, limit: float = RUN_LIMIT_S) -> str:
    """Read a process's lines up to the first that holds `text`."""
    lines = []
    deadline = time.monotonic() + limit
    assert process.stdout is not None
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        lines.append(line)
        if text in line or not line:
            break
    output = "".join(lines)
    assert text in output, output
    return output


def interrupt(process: "subprocess.Popen[str]", limit: float = RUN_LIMIT_S) -> Outcome:
    """Ctrl-C, which reaches the whole process group, then wait for the end."""
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=limit)
    return Outcome(process.returncode, output)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One head node with its job server on loopback, for all tests of the session."""
    log = tmp_path_factory.mktemp("head") / "log.txt"
    for _ in range(HEAD_TRIES):  # a port that was free may be another's by the time that Ray takes it
        port, dashboard = free_port(), free_port()
        ray = str(BIN / "ray")
        command = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--object-store-memory=1000000000"]
        command += ["--include-dashboard=true", "--block"]
        with log.open("a") as file:
            at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # of 30 s
            head = subprocess.Popen(command, env=environment() | at_once, stdout=file, stderr=file)
        try:
            if listens(port, head) and listens(dashboard, head):
                yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
                return
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)
    pytest.fail(f"no head node could be started:\n{log.read_text()}")


def listens(port: int, process: "subprocess.Popen[bytes]", limit: float = 120) -> bool:
    """Wait until a process listens on a port; whether it does."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="session")
def full_run(cluster: Cluster, small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small run of the main job, full fine-tuning, `max_lag` 1; shared by the tests that look at its folder."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    outcome = raylign("align", str(small_config), f"run.dir={folder}", f"cluster.address={cluster.address}")
    assert outcome.code == 0, outcome.output + logs(folder)
    (folder / "console.txt").write_text(outcome.output)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def second_run(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended where it began: with the weights of its base."""
    folder = tmp_path_factory.mktemp("second") / "again"
    shutil.copytree(full_run, folder)
    shutil.copy(ROOT / "rl/world/base/model.safetensors", folder / "model/model.safetensors")
    return folder


@pytest.fixture(scope="session")
def blind_set(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Offline BDHS: the rejected answers made once, by the base."""
    folder = tmp_path_factory.mktemp("blind") / "set"
    outcome = raylign(
        "annotate", str(ROOT / "jobs/configs/world-annotate.yaml"), f"run.dir={folder}", "data.prompts=60",
        "pairs={kind: bdhs, threshold: 0.75}", f"cluster.address={cluster.address}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.output
    return folder


def pairs_of(folder: Path, step: int) -> tuple[Pair, ...]:
    batch = RunFolder(str(folder)).read_batch(step)
    assert batch is not None
    return batch.pairs


def logs(folder: Path) -> str:
    """The ends of a run's logs, for a failed test to show."""
    return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in (folder / "logs").glob("*.log"))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def listeners(port: int) -> set[str]:
    """The IPv4 addresses on which something listens on a port, as the kernel writes them; 0100007F is loopback."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    bound = (row[1].split(":") for row in table if row[3] == "0A")
    return {address for address, hexadecimal in bound if int(hexadecimal, 16) == port}
