"""The endpoint beside bare vLLM under a growing number of streaming clients with pictures: docs/results.md.

python benchmarks/serve_load.py             the same model and engine options for both, one after the other
python benchmarks/serve_load.py --width 768 with a larger model of random weights, whose steps take longer
python benchmarks/serve_load.py --crowd     more clients than are let in
python benchmarks/serve_load.py --kill      two replicas, of which one is killed
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster.connect import ClusterSettings, connect, cpu_engine_variables, free_port
from rl.policy import resolve_model, save_checkpoint
from rl.world.checkpoint import make_model, make_processor, make_tokenizer
from rl.world.prompts import training_prompts
from serve.app import APP, BASE, running_app
from serve.settings import EngineSettings, LimitSettings, ServeSettings
from serve.versions import Registry, Version, weights_digest

LENGTH, TOKENS, SEQUENCES = 128, 48, 64
RAMP_S = 3.0
PERCENTILES = (50, 95, 99)


@dataclass
class Seen:
    """What the clients of one level saw; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def row(self, name: str, clients: int) -> str:
        """A row of the table: requests/s, time to the first token, an answer's mean time per further token, errors."""
        done = self.ended["done"]
        shown = [
            f"{1000 * value:.0f}"
            for times in (self.first, self.between)
            for value in np.percentile(times or [np.nan], PERCENTILES)
        ]
        errors = 1 - done / max(1, sum(self.ended.values()))
        return f"| {name} | {clients} | {done / self.seconds:.2f} | {' | '.join(shown)} | {100 * errors:.0f} % |"


def bodies(model: str) -> Iterator[bytes]:
    """Requests without end, each with a picture of its own and an answer of the same length."""
    prompts = [prompt for prompt in training_prompts(4000, 0.0, seed=1) if prompt.images]
    while True:
        for prompt in prompts:
            parts = [
                {"type": "image_url", "image_url": {"url": prompt.images[0].url}},
                {"type": "text", "text": prompt.text},
            ]
            body = {"model": model, "stream": True, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            yield json.dumps({**body, "messages": [{"role": "user", "content": parts}]}).encode()


async def visit(client: httpx.AsyncClient, body: bytes, seen: Seen) -> float:
    """One streamed answer; returns the seconds after which the server wants to be asked again."""
    asked = time.perf_counter()
    times: list[float] = []
    how = "cut off"
    headers = {"Content-Type": "application/json"}
    try:
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as answer:
            if answer.status_code != 200:
                seen.ended[str(answer.status_code)] += 1
                return float(answer.headers.get("retry-after", 0))
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    how = "done"
                elif line.startswith('data: {"error"'):
                    how = json.loads(line[6:])["error"]["code"]
                elif line.startswith("data: {"):
                    times.append(time.perf_counter())
    except httpx.HTTPError as error:
        how = type(error).__name__
    seen.ended[how] += 1
    if how == "done":
        seen.first.append(times[1] - asked)  # the first event has the role alone
        seen.between.append((times[-1] - times[1]) / max(1, len(times) - 2))
    return 0.0


async def level(url: str, clients: int, seconds: float, model: str) -> Seen:
    """What so many clients see that ask again as soon as they are answered."""
    seen, source = Seen(), bodies(model)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await asyncio.gather(*(visit(client, next(source), Seen()) for _ in range(min(clients, 8))))
        began = time.perf_counter()

        async def come_again(number: int) -> None:
            await asyncio.sleep(RAMP_S * number / clients)
            while (left := began + seconds - time.perf_counter()) > 0:
                await asyncio.sleep(min(left, await visit(client, next(source), seen)))

        await asyncio.gather(*(come_again(number) for number in range(clients)))
        seen.seconds = time.perf_counter() - began
    return seen


@contextmanager
def bare(model: str, port: int) -> Iterator[str]:
    """`vllm serve` with the engine options that our endpoint gives, its executor among them."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(LENGTH),
        "--max-num-seqs", str(SEQUENCES), "--limit-mm-per-prompt", '{"image": 1}', "--enforce-eager",
        "--no-enable-chunked-prefill", "--disable-log-stats", "--disable-uvicorn-access-log",
        "--distributed-executor-backend", "uni",
    ]  # fmt: skip
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # without it vLLM takes "mp" for "uni" on a CPU
    env = os.environ | cpu_engine_variables(threads=1, cache_gib=1) | {"VLLM_NO_USAGE_STATS": "1"} | one_process
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=60)


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Any, limit: float = 300) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            sys.exit(f"vLLM did not start:\n{log.read().decode()[-3000:]}")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    sys.exit("vLLM did not start in time")


@contextmanager
def ours(model: str, port: int, folder: str, **engine: Any) -> Iterator[str]:
    """Our endpoint with the base alone."""
    settings = ServeSettings(
        dir=folder, port=port, engine=EngineSettings(max_sequences=SEQUENCES, slots=0, **engine),
        limits=LimitSettings(requests_per_minute=1_000_000),
    )  # fmt: skip
    registry = Registry(Version("base", model, weights_digest(model)), "float32", LENGTH, max_images=1)
    with running_app(settings, registry, ["<image>"]):
        yield f"http://127.0.0.1:{port}"


def larger_model(width: int, folder: Path) -> str:
    """The world's architecture with a language model of that width and 12 layers, random weights."""
    tokenizer = make_tokenizer()
    model = make_model(0, tokenizer, width=width, layers=12)
    save_checkpoint(model, dict(model.state_dict()), make_processor(tokenizer), folder)
    return str(folder)


def replicas() -> list[int]:
    """Process ids of the base's replicas."""
    named = psutil.process_iter(["cmdline"])
    return [one.pid for one in named if "raylign:base" in " ".join(one.info["cmdline"] or ())]


def ready() -> int:
    """The base's replicas that can be asked."""
    from ray import serve

    return int(serve.status().applications[APP].deployments[BASE].replica_states.get("RUNNING", 0))


async def kill_one(url: str, clients: int, seconds: float) -> AsyncIterator[str]:
    """Load, with one replica killed after a third of the time."""
    task = asyncio.create_task(level(url, clients, seconds, "base"))
    await asyncio.sleep(seconds / 3)
    before = replicas()
    os.kill(before[0], signal.SIGKILL)
    killed = time.perf_counter()
    yield f"{len(before)} replicas; one killed"
    # Serve notices a moment later, so what it says counts only once another process is there.
    while before[0] in (now := replicas()) or min(len(now), await asyncio.to_thread(ready)) < len(before):
        await asyncio.sleep(0.5)
    yield f"{len(before)} replicas ready again after {time.perf_counter() - killed:.0f} s"
    seen = await task
    yield f"how the requests ended: {dict(seen.ended)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    parser.add_argument("--width", type=int, help="of a larger model's language model, a multiple of 64")
    parser.add_argument("--crowd", action="store_true")
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = resolve_model("rl/world/base")
        if options.width:
            model = larger_model(options.width, Path(folder) / "model")
        if options.kill:
            connect(ClusterSettings())
            with ours(model, free_port(), folder, replicas=2) as url:

                async def tell() -> None:
                    async for line in kill_one(url, max(options.clients), 3 * options.seconds):
                        print(line, flush=True)

                asyncio.run(tell())
            return
        names = " | ".join(f"{what} p{p}, ms" for what in ("first token", "mean further token") for p in PERCENTILES)
        print(f"| server | clients | requests/s | {names} | errors |")
        print("|" + "---|" * (4 + 2 * len(PERCENTILES)))
        if options.crowd:
            connect(ClusterSettings())
            with ours(model, free_port(), folder, max_waiting=0) as url:
                for clients in (SEQUENCES, 2 * SEQUENCES, 4 * SEQUENCES):
                    print(asyncio.run(level(url, clients, options.seconds, "base")).row("raylign", clients), flush=True)
            return
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for name in ("vllm serve", "raylign"):
                if name == "raylign":
                    connect(ClusterSettings())
                with bare(model, free_port()) if name == "vllm serve" else ours(model, free_port(), folder) as url:
                    for clients in options.clients:
                        seen = asyncio.run(level(url, clients, options.seconds, "base"))
                        rates.setdefault((name, clients), []).append(seen.ended["done"] / seen.seconds)
                        print(seen.row(name, clients), flush=True)
        for clients in options.clients:
            ratio = np.mean(rates["raylign", clients]) / np.mean(rates["vllm serve", clients])
            print(f"\n{clients} clients: {100 * ratio:.0f} % of bare vLLM's requests/s")


if __name__ == "__main__":
    main()
