"""How well the remote judge uses an endpoint of 50 ms latency, keeps a rate limit, and its cache: docs/results.md.

python benchmarks/judge_throughput.py
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import SecretStr, TypeAdapter

sys.path.insert(0, str(Path(__file__).parents[1]))

from rl.judges import JudgeContext, JudgeSettings
from rl.types import Completion, Prompt
from rl.world.prompts import training_prompts
from tests.judge_api import KEY, JudgeApi, judge_api

LATENCY_S = 0.05
RATE = 300


async def grade(api: JudgeApi, prompts: list[Prompt], folder: str, **fields: Any) -> tuple[float, dict[str, float]]:
    """Seconds for all prompts with four answers each, and what the judge counted."""
    settings: Any = TypeAdapter(JudgeSettings).validate_python(
        {"kind": "openai", "model": "m", "base_url": f"{api.url}/v1", "api_key_env": "KEY", "cache": None, **fields}
    )
    judge = settings.build(JudgeContext(Path(folder), {"KEY": SecretStr(KEY)}))
    groups = [[Completion(p.id, (), (), f"answer {i}", (), 0, "stop") for i in range(4)] for p in prompts]
    started = time.perf_counter()
    await judge.grade(prompts, groups)
    return time.perf_counter() - started, judge.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400)
    options = parser.parse_args()
    prompts = training_prompts(options.calls, 0.25, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        print("| calls in flight allowed | seen at most | calls/s | limit by latency | share of it |")
        print("|---|---|---|---|---|")
        for concurrency in (1, 4, 16, 32):
            with judge_api() as api:
                api.delay = LATENCY_S
                seconds, _ = asyncio.run(grade(api, prompts, folder, concurrency=concurrency))
                rate, limit = len(api.requests) / seconds, concurrency / LATENCY_S
                print(
                    f"| {concurrency} | {api.most_in_flight} | {rate:.1f} | {limit:.0f} | {100 * rate / limit:.0f} % |"
                )
        with judge_api() as api:
            api.delay = LATENCY_S
            asyncio.run(grade(api, prompts, folder, concurrency=32, requests_per_minute=RATE))
            windows = [sum(start <= moment < start + 60 for moment in api.times) for start in api.times]
            whole = api.times[-1] - api.times[0]
            print(f"\nlimit of {RATE} calls a minute: at most {max(windows)} in any 60 s of {whole:.0f}")
        with judge_api() as api:
            cache = f"{folder}/replies.sqlite"
            for run in ("first run", "rerun from the cache"):
                before = len(api.requests)
                seconds, spent = asyncio.run(grade(api, prompts, folder, cache=cache))
                made, cached = len(api.requests) - before, spent.get("cached", 0)
                print(f"{run}: {made} calls, {cached:.0f} replies from the cache, {seconds:.2f} s")


if __name__ == "__main__":
    main()
