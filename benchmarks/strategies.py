"""The strategies of arXiv 2402.10884 on the tiny world, and its two ablations: the tables of docs/results.md.

    python benchmarks/strategies.py runs/strategies --seeds 0 1 2

For each seed the base model's answers to the same 2,000 prompts are judged once by the oracle; every strategy learns
from that set or from the reference answers to its prompts, and is measured greedily on the same 2,000 held-out prompts.
What is measured already is not measured again. Takes about 20 minutes a seed on two cores.
"""

import argparse
import json
from pathlib import Path

from jobs.config import CONFIGS
from jobs.reproduce import Bench, raylign, table

COLUMNS = ("chair_s", "chair_i", "object_recall", "pope_f1", "answer_accuracy", "language_accuracy", "mean_length")
METRICS = dict(zip(COLUMNS, COLUMNS, strict=True))
GRADES = "{helpfulness} {correctness} {coherence}"
SFT_DATA = {
    "standard SFT": "{kind: reference, prompts: {kind: world, prompts: 2000}}",
    "rejection sampling": "{kind: best, path: PATH}",
    "SteerLM": '{kind: steerlm, path: PATH, template: "' + GRADES + '"}',
}
FLIPPED = (0.25, 0.5, 0.75)
FRACTIONS = (0.25, 0.5, 0.75)


def annotate(bench: Bench) -> Path:
    """The base's answers with their grades, and pairs."""
    answers = bench.annotate("answers")
    if "pairs" not in bench.results:
        bench.keep("pairs", json.loads((answers / "quality.json").read_text())["pairs"])
    return answers


def supervised(bench: Bench, name: str) -> None:
    output = bench.folder / name.replace(" ", "-")
    data = SFT_DATA[name].replace("PATH", str(annotate(bench)))
    if name not in bench.results:
        if not (output / "model").exists():
            config = str(CONFIGS / "world-sft.yaml")
            raylign("sft", config, f"output={output}", f"data={data}", f"seed={bench.seed}")
        bench.measure(name, str(output / "model"), *(("--suffix", "4 4 4") if name == "SteerLM" else ()))


def dpo(bench: Bench, name: str, **more: float) -> None:
    """Offline DPO on the annotated pairs."""
    fields = "".join(f", {field}: {value}" for field, value in more.items())
    bench.align(name, f"pairs={{kind: offline, path: {annotate(bench)}{fields}}}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablate", type=int, nargs="*", default=[0, 1, 2], help="seeds of the two ablations")
    options = parser.parse_args()
    benches = {seed: Bench(options.folder.absolute(), seed) for seed in options.seeds}
    for bench in benches.values():
        bench.measure("base", "rl/world/base")
        dpo(bench, "DPO")
        for name in SFT_DATA:
            supervised(bench, name)
    for seed in options.ablate:
        for flipped in FLIPPED:
            dpo(benches[seed], f"{100 * flipped:.0f} % flipped", flipped=flipped)
        for fraction in FRACTIONS:
            dpo(benches[seed], f"{100 * fraction:.0f} % of the pairs", fraction=fraction)
    every = [bench.results for bench in benches.values()]
    print(f"pairs: {', '.join(str(one['pairs']) for one in every)}\n")
    print(table(every, ["base", *SFT_DATA, "DPO"], METRICS), end="\n\n")
    ablated = [benches[seed].results for seed in options.ablate]
    if ablated:
        print(table(ablated, ["base", "DPO", *(f"{100 * one:.0f} % flipped" for one in FLIPPED)], METRICS), end="\n\n")
        print(table(ablated, [*(f"{100 * one:.0f} % of the pairs" for one in FRACTIONS), "DPO"], METRICS))


if __name__ == "__main__":
    main()
