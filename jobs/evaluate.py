"""`raylign evaluate MODEL`: what a model does on held-out prompts of the tiny world, as JSON."""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.connect import ClusterSettings, Role, check_room, connect
from jobs.cli import job_parser, run
from rl.data import WorldData
from rl.evaluation import Answer, measure
from rl.judges.oracle import OracleJudge
from rl.policy import PolicySettings, whole_model
from rl.render import with_suffix
from rl.rollout import Rollouts, RolloutSettings, SamplingSettings, start_rollouts
from rl.types import Prompt


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, sample and measure; returns the exit code."""
    parser = job_parser("evaluate", "Measure a model on the tiny world; prints JSON.")
    parser.add_argument("model", help="model folder or PEFT adapter, for example rl/world/base or runs/demo/model")
    parser.add_argument("--scenes", type=int, default=400, help="scenes, five prompts each (default: 400)")
    parser.add_argument("--split", choices=("validation", "heldout"), default="heldout")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, where the temperature is above 0")
    parser.add_argument("--suffix", help="a line behind every user message, such as a SteerLM model's wanted grades")
    options = parser.parse_args(arguments)
    settings = RolloutSettings()
    merged = tempfile.TemporaryDirectory(prefix="raylign-merged-")
    model = whole_model(options.model, Path(merged.name), "float32")
    connect(ClusterSettings())
    check_room([Role("rollout worker", 1, settings.resources)])
    data = WorldData(prompts=1, heldout_scenes=options.scenes, heldout_split=options.split)
    sampling = SamplingSettings(completions=1, temperature=options.temperature)
    _, prompts = data.load(0, lambda faults: None)
    if options.suffix:
        prompts = [with_suffix(prompt, options.suffix) for prompt in prompts]
    print(json.dumps(asyncio.run(evaluate(model, settings, prompts, sampling, options.seed)), indent=1))
    return 0


async def evaluate(
    model: str, settings: RolloutSettings, prompts: Sequence[Prompt], sampling: SamplingSettings, seed: int
) -> dict[str, Any]:
    """All metrics of one answer to each held-out prompt."""
    with tempfile.TemporaryDirectory() as folder:
        rollouts = Rollouts(start_rollouts(settings, PolicySettings(model=model), model, "object_store", Path(folder)))
        groups = await rollouts.generate(prompts, sampling, seed)
    verdicts = await OracleJudge().grade(prompts, groups)
    answers = [Answer(p, group[0], judged[0]) for p, group, judged in zip(prompts, groups, verdicts, strict=True)]
    return measure(answers, {})


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
