"""`raylign reproduce world`: the methods of arXiv 2407.02477 on the tiny world, as tables and plots, from scratch."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cluster.errors import ConfigError, RaylignError
from jobs.cli import job_parser, run
from jobs.config import CONFIGS
from jobs.paths import run_address

UPDATES, PAIRS_PER_UPDATE, PROMPTS = 60, 32, 2000
ANSWERS = ("count_accuracy", "place_accuracy", "pope_accuracy")
BDHS = "{kind: bdhs, threshold: 0.75}"
STORED = "{kind: offline, path: EXTERNAL}"


class Metric(NamedTuple):
    """A column of the tables."""

    key: str
    label: str
    more_is_better: bool
    paper: int | None
    """Which of the paper's columns it stands for: 0 POPE, 1 MMHALBench-V, 2 LLaVA-Bench, 3 object recall."""


METRICS = (
    Metric("chair_s", "CHAIR per sentence", False, 1),
    Metric("chair_i", "CHAIR per object", False, None),
    Metric("object_recall", "object recall", True, 3),
    Metric("pope_f1", "POPE F1", True, 0),
    Metric("judge_score", "answer quality", True, 2),
    Metric("answer_accuracy", "answer accuracy", True, None),
    Metric("language_accuracy", "language accuracy", True, None),
    Metric("mean_length", "mean length", True, None),
)


class Method(NamedTuple):
    """One row: what is overridden in the demo's config, and what the paper measured."""

    overrides: tuple[str, ...]
    paper: tuple[float, float, float, float] | None = None
    """POPE, MMHALBench-V, LLaVA-Bench and object recall (tables 2, 6 and 12); None if it is not in the paper."""


PAPER_BASE = (86.40, 2.75, 80.85, 68.13)
METHODS: dict[str, Method] = {
    "offline DPO": Method((f"pairs={STORED}",), (88.09, 3.07, 78.63, 73.48)),
    "offline IPO": Method((f"pairs={STORED}", "loss.kind=ipo"), (87.62, 3.11, 82.34, 69.81)),
    "offline SLiC": Method((f"pairs={STORED}", "loss.kind=hinge"), (88.28, 3.15, 81.99, 74.32)),
    "online DPO": Method((), (86.49, 2.94, 82.61, 68.45)),
    "mixed DPO": Method((f"pairs={{kind: mixed, stored: {STORED}}}",), (88.03, 3.10, 82.75, 74.53)),
    "BDHS offline": Method(("pairs={kind: offline, path: BLIND}",), (88.75, 2.71, 86.33, 75.58)),
    "BDHS online": Method((f"pairs={BDHS}",), (88.83, 2.99, 85.03, 74.09)),
    "BDHS online + external": Method(
        (f"pairs={{kind: averaged, stored: {STORED}, second: {BDHS}}}",), (88.38, 2.81, 84.01, 74.00)
    ),
    "POVID distortion + external": Method(
        (f"pairs={{kind: averaged, stored: {STORED}, second: {{kind: povid, noise: 900}}}}",),
        (88.33, 2.64, 80.15, 69.39),
    ),
    "online DPO, max_lag 0": Method(("loop.max_lag=0",)),
    "online DPO, max_lag 4": Method(("loop.max_lag=4",)),
}


class Bench:
    """One seed's models and figures, in a folder; what is measured already is not measured again."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder / f"seed-{seed}", seed
        self._file = self.folder / "results.json"
        self.results: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def annotate(self, name: str, *overrides: str) -> Path:
        """The run folder of a set of pairs of this seed's prompts."""
        path = self.folder / name
        if not (path / "quality.json").exists():
            start = "--resume" if (path / "config.yaml").exists() else "--overwrite"
            raylign(
                "annotate", str(CONFIGS / "world-annotate.yaml"), f"run.dir={path}", f"seed={self.seed}", *overrides,
                start,
            )  # fmt: skip
        return path

    def align(self, name: str, *overrides: str) -> None:
        """Align the base and measure what comes out, the same number of updates whatever the pairs."""
        if name not in self.results:
            output = self.folder / name.replace(" ", "-").replace(",", "").replace("%", "")
            raylign(
                "align", str(CONFIGS / "demo.yaml"), f"run.dir={output}", f"seed={self.seed}", "--overwrite",
                f"loop.steps={UPDATES}", f"loop.prompts_per_step={PAIRS_PER_UPDATE}", f"loop.eval_every={UPDATES}",
                f"loop.checkpoint_every={UPDATES}", f"data.prompts={PROMPTS}", "data.heldout_scenes=5", *overrides,
            )  # fmt: skip
            summary = json.loads((output / "summary.json").read_text())
            more = {"pairs": summary["pairs"], "seconds": summary["seconds"]["total"], "similar": summary["similar"]}
            self.measure(name, str(output / "model"), more=more)

    def measure(self, name: str, model: str, *options: str, more: Mapping[str, Any] | None = None) -> None:
        """Figures of a model on 2,000 held-out prompts, greedily."""
        if name not in self.results:
            printed = raylign("evaluate", model, *options)
            metrics = json.loads(printed[printed.index("{") :])
            metrics["answer_accuracy"] = fmean(metrics[one] for one in ANSWERS)
            self.keep(name, metrics | (more or {}))

    def keep(self, name: str, value: Any) -> None:
        """Write a figure down."""
        self.results[name] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.results, indent=1))


def raylign(*arguments: str) -> str:
    """What the command prints; it must succeed.

    Raises:
        RaylignError: it did not.
    """
    print("raylign", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise RaylignError(f"`raylign {' '.join(arguments)}` ended with exit code {done.returncode}; see above")
    return done.stdout


def table(results: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str]) -> str:
    """Markdown: the mean over the seeds, with the lowest and the highest where they differ. `columns` maps metrics to
    headings."""
    rows = [["", *columns.values()], ["---"] * (len(columns) + 1)]
    for name in names:
        rows.append([name, *(_spread([one[name][metric] for one in results]) for metric in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = (f"{value:.3f}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def directions(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """For each method and each metric that the paper has too: the paper's change, ours, and whether they agree."""
    rows = []
    for name in names:
        paper = METHODS[name].paper
        for metric in METRICS if paper else ():
            if paper is None or metric.paper is None:
                continue
            theirs = paper[metric.paper] - PAPER_BASE[metric.paper]
            ours = [one[name][metric.key] - one["base"][metric.key] for one in results]
            better = [change if metric.more_is_better else -change for change in ours]
            verdict = "agrees" if all(b * theirs > 0 for b in better) else "differs"
            if min(better) <= 0 <= max(better):
                verdict = "no change here"
            rows.append([name, metric.label, _told(theirs, theirs), _told(fmean(better), fmean(ours)), verdict])
    return rows


def _told(better: float, change: float) -> str:
    word = "same" if round(better, 3) == 0 else "better" if better > 0 else "worse"
    return f"{word} ({change:+.3f})"


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, run what is missing, write the tables; returns the exit code."""
    parser = job_parser("reproduce", "Measure the methods of arXiv 2407.02477 on the tiny world.")
    parser.add_argument("experiment", choices=("world",))
    parser.add_argument("folder", nargs="?", default="runs/reproduce", help="gone on with if it is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known = ", ".join(map(repr, METHODS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=known)
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.methods) - set(METHODS)):
        parser.error(f"--methods: {unknown[0]!r} is none of {known}")
    if "://" in options.folder:
        raise ConfigError(f"folder: {options.folder} is no local folder, which this job needs")
    folder = Path(run_address(options.folder))
    benches = [Bench(folder, seed) for seed in options.seeds]
    for bench in benches:
        bench.measure("base", "rl/world/base")
        for name in options.methods:
            bench.align(name, *_located(METHODS[name].overrides, bench))
    results = [bench.results for bench in benches]
    write_results(folder, results, ["base", *options.methods], options.seeds)
    return 0


def _located(overrides: Sequence[str], bench: Bench) -> list[str]:
    """The overrides with the sets they name made and filled in."""
    sets: dict[str, Callable[[], Path]] = {
        "EXTERNAL": lambda: bench.annotate("external", "pairs={kind: constructed}"),
        "BLIND": lambda: bench.annotate("blind", f"pairs={BDHS}"),
    }
    filled = []
    for override in overrides:
        for placeholder, make in sets.items():
            if placeholder in override:
                override = override.replace(placeholder, str(make()))
        filled.append(override)
    return filled


def write_results(
    folder: Path, results: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> None:
    """results.md and report.html."""
    from rl.charts import dot_chart, render_page

    figures = table(results, names, {metric.key: metric.label for metric in METRICS})
    compared = directions(results, [name for name in names if name != "base"])
    heading = ["method", "metric", "paper", "here", ""]
    lines = ["| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *compared]]
    (folder / "results.md").write_text("\n".join([figures, "", *lines, ""]))
    values = {m.key: {name: [one[name][m.key] for one in results] for name in names} for m in METRICS}
    cells = {name: [_spread(values[m.key][name]).partition(" ") for m in METRICS] for name in names}
    page = render_page(
        "reproduce.html.j2",
        name="tiny world",
        seeds=seeds,
        names=names,
        metrics=METRICS,
        charts=[dot_chart(metric.label, "", values[metric.key], "base") for metric in METRICS],
        compared=compared,
        cells=cells,
    )
    (folder / "report.html").write_text(page)
    print(figures, "", *lines, "", f"{folder / 'results.md'}", f"{folder / 'report.html'}", sep="\n")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
