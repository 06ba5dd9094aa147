"""How the two ways of restricting sight differ: dropping hidden image embeddings, or masking them in place.

    python benchmarks/sight.py

For each threshold both ways answer the same prompts about the same pictures of the tiny world, greedily and with the
same masks. Takes about two minutes on two cores.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from cluster.connect import ClusterSettings, connect
from rl.masked import MaskedSettings, start_masked
from rl.policy import PolicySettings, resolve_model
from rl.rollout import Blind, RolloutSettings, SamplingSettings, start_rollouts
from rl.sight import Continuation, Sight
from rl.types import Prompt
from rl.world.grading import hallucinated
from rl.world.prompts import evaluation_prompts

THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
GREEDY = SamplingSettings(completions=1, temperature=0, max_tokens=48)


def differing(one: Sequence[str], other: Sequence[str]) -> float:
    return fmean(a != b for a, b in zip(one, other, strict=True))


def invented(prompts: Sequence[Prompt], answers: Sequence[str]) -> float:
    """Objects named that are not there, per description."""
    found = [
        len(hallucinated(answer, prompt.truth))
        for prompt, answer in zip(prompts, answers, strict=True)
        if prompt.truth and prompt.truth["kind"] == "describe"
    ]
    return fmean(found)


async def compare(scenes: int, folder: Path) -> None:
    model, policy = resolve_model("rl/world/base"), PolicySettings(max_length=128)
    prompts = [prompt for prompt in evaluation_prompts(scenes, seed=0, split="validation") if prompt.images]
    drop = Blind(start_rollouts(RolloutSettings(), policy, model, "object_store", folder, blind=True))
    mask = Blind(start_masked(MaskedSettings(), policy, model, folder))
    print(f"{len(prompts)} prompts, 16 embeddings a picture\n")
    print("| threshold | drop and full sight | mask and full sight | drop and mask | invented, drop | invented, mask |")
    print("|---|---|---|---|---|---|")
    full: list[str] = []
    for threshold in THRESHOLDS:
        requests = [Continuation(p, "", Sight(seed, threshold, 0), False) for seed, p in enumerate(prompts)]
        dropped, masked = [await way.go_on(requests, GREEDY, 0) for way in (drop, mask)]
        full = full or dropped
        shares = [differing(dropped, full), differing(masked, full), differing(dropped, masked)]
        cells = [
            *(f"{100 * share:.0f} %" for share in shares),
            *(f"{invented(prompts, a):.2f}" for a in (dropped, masked)),
        ]
        print(f"| {threshold:g} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100)
    options = parser.parse_args()
    connect(ClusterSettings())
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(options.scenes, Path(folder)))


if __name__ == "__main__":
    main()
