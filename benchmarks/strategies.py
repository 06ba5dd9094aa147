"""The strategies of arXiv 2402.10884 on the tiny world, and its two ablations: the tables of docs/results.md.

    python benchmarks/strategies.py runs/strategies --seeds 0 1 2

For each seed the base model's answers to the same 2,000 prompts are judged once by the oracle; every strategy learns
from that set or from the reference answers to its prompts, and is measured greedily on the same 2,000 held-out prompts.
What is measured already is not measured again. Takes about 20 minutes a seed on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

METRICS = ("chair_s", "chair_i", "object_recall", "pope_f1", "answer_accuracy", "language_accuracy", "mean_length")
ANSWERS = ("count_accuracy", "place_accuracy", "pope_accuracy")
GRADES = "{helpfulness} {correctness} {coherence}"
SFT_DATA = {
    "standard SFT": "{kind: reference, prompts: {kind: world, prompts: 2000}}",
    "rejection sampling": "{kind: best, path: PATH}",
    "SteerLM": '{kind: steerlm, path: PATH, template: "' + GRADES + '"}',
}
FLIPPED = (0.25, 0.5, 0.75)
FRACTIONS = (0.25, 0.5, 0.75)


class Bench:
    """One seed's models and figures, in a folder."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed = folder / f"seed-{seed}", seed
        self._answers = self._folder / "answers"
        self._file = self._folder / "results.json"
        self.results: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def annotate(self) -> None:
        """The base's answers with their grades, and pairs."""
        if "pairs" not in self.results:
            quality = self._answers / "quality.json"
            if not quality.exists():
                raylign(
                    "annotate", "jobs/configs/world-annotate.yaml", f"run.dir={self._answers}", f"seed={self._seed}"
                )
            self._keep("pairs", json.loads(quality.read_text())["pairs"])

    def base(self) -> None:
        self._measure("base", "rl/world/base")

    def supervised(self, name: str) -> None:
        output = self._folder / name.replace(" ", "-")
        data = SFT_DATA[name].replace("PATH", str(self._answers))
        if name not in self.results:
            if not (output / "model").exists():
                raylign("sft", "jobs/configs/world-sft.yaml", f"output={output}", f"data={data}", f"seed={self._seed}")
            self._measure(name, str(output / "model"), *(("--suffix", "4 4 4") if name == "SteerLM" else ()))

    def dpo(self, name: str, **more: float) -> None:
        """Offline DPO on the annotated pairs, the same number of updates whatever the pairs."""
        output = self._folder / name.replace(" ", "-").replace("%", "")
        fields = "".join(f", {field}: {value}" for field, value in more.items())
        if name not in self.results:
            raylign(
                "align", "jobs/configs/demo.yaml", f"run.dir={output}", f"seed={self._seed}", "--overwrite",
                f"pairs={{kind: offline, path: {self._answers}{fields}}}", "loop.steps=60", "loop.prompts_per_step=32",
                "loop.eval_every=60", "loop.checkpoint_every=60", "data.heldout_scenes=5",
            )  # fmt: skip
            self._measure(name, str(output / "model"))

    def _measure(self, name: str, model: str, *options: str) -> None:
        if name not in self.results:
            printed = raylign("evaluate", model, *options)
            metrics = json.loads(printed[printed.index("{") :])
            metrics["answer_accuracy"] = fmean(metrics[one] for one in ANSWERS)
            self._keep(name, metrics)

    def _keep(self, name: str, value: Any) -> None:
        self.results[name] = value
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.results, indent=1))


def raylign(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    print("raylign", *arguments, file=sys.stderr, flush=True)
    command = [str(Path(sys.executable).parent / "raylign"), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(results: list[dict[str, Any]], names: list[str], metrics: tuple[str, ...]) -> str:
    """Markdown: the mean over the seeds, and below it the lowest and the highest."""
    rows = [["", *metrics], ["---"] * (len(metrics) + 1)]
    for name in names:
        columns = [[one[name][metric] for one in results] for metric in metrics]
        rows.append([name, *(f"{fmean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablate", type=int, nargs="*", default=[0, 1, 2], help="seeds of the two ablations")
    options = parser.parse_args()
    benches = {seed: Bench(options.folder.absolute(), seed) for seed in options.seeds}
    for bench in benches.values():
        bench.annotate()
        bench.base()
        bench.dpo("DPO")
        for name in SFT_DATA:
            bench.supervised(name)
    for seed in options.ablate:
        for flipped in FLIPPED:
            benches[seed].dpo(f"{100 * flipped:.0f} % flipped", flipped=flipped)
        for fraction in FRACTIONS:
            benches[seed].dpo(f"{100 * fraction:.0f} % of the pairs", fraction=fraction)
    every = [bench.results for bench in benches.values()]
    print(f"pairs: {', '.join(str(one['pairs']) for one in every)}\n")
    print(table(every, ["base", *SFT_DATA, "DPO"], METRICS), end="\n\n")
    ablated = [benches[seed].results for seed in options.ablate]
    if ablated:
        print(table(ablated, ["base", "DPO", *(f"{100 * one:.0f} % flipped" for one in FLIPPED)], METRICS), end="\n\n")
        print(table(ablated, [*(f"{100 * one:.0f} % of the pairs" for one in FRACTIONS), "DPO"], METRICS))


if __name__ == "__main__":
    main()
