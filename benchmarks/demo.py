"""The demo over several seeds, as the tables of docs/results.md: python benchmarks/demo.py --seeds 0 1 2

Run it on an otherwise idle machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METRICS = ("chair_s", "chair_i", "object_recall", "pope_f1", "language_accuracy", "judge_score", "win_rate")


def run_demo(seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run of the demo; returns its summary.json."""
    command = [str(Path(sys.executable).parent / "raylign"), "align", "jobs/configs/demo.yaml"]
    subprocess.run([*command, f"seed={seed}", f"run.dir={folder}", *overrides], check=True)
    return json.loads((folder / "summary.json").read_text())


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {seed: run_demo(seed, Path(folder) / str(seed), options.overrides) for seed in options.seeds}
    rows = [
        [str(seed), *(f"{run['before'][name]:.3f} → {run['after'][name]:.3f}" for name in METRICS)]
        for seed, run in runs.items()
    ]
    print(table(["seed", *METRICS], rows), end="\n\n")
    cost = [
        [
            str(seed),
            f"{run['seconds']['total']:.0f}",
            str(run["updates"]),
            str(run["pairs"]),
            f"{run['peak_memory_bytes'] / 2**30:.2f}",
            f"{run['probe_max_abs_diff']:.1e}",
        ]
        for seed, run in runs.items()
    ]
    print(table(["seed", "seconds", "updates", "pairs", "peak GiB", "largest probe difference"], cost), end="\n\n")
    parts = list(next(iter(runs.values()))["startup"])
    start = [[str(seed), *(f"{run['startup'][part]:.1f}" for part in parts)] for seed, run in runs.items()]
    print(table(["seed", *(f"{part.replace('_', ' ')}, s" for part in parts)], start))


if __name__ == "__main__":
    main()
