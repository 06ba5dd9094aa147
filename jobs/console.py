"""What a person sees while a run goes on: one line per step, in plain text, for terminals and job logs alike."""

import math
import time
from typing import Any

from rl.store import RunFolder
from rl.summary import SHOWN_METRICS, describe_judging

HEADER_EVERY = 20

# (heading, width, how to show a row)
_COLUMNS: tuple[tuple[str, int, str], ...] = (
    ("version", 7, "{policy_version:d}"),
    ("lag", 4, "{lag:.1f}"),
    ("pairs", 5, "{pairs:d}"),
    ("ties", 5, "{ties:d}"),
    ("same", 5, "{identical:d}"),
    ("abst", 5, "{abstentions:d}"),
    ("loss", 7, "{loss:.4f}"),
    ("acc", 5, "{accuracy:.2f}"),
    ("margin", 7, "{reward_margin:.3f}"),
    ("kl/tok", 7, "{kl:.4f}"),
    ("length", 6, "{mean_length:.1f}"),
    ("tok/s", 6, "{tokens_per_second:.0f}"),
    ("sample", 6, "{seconds_sampling:.1f}"),
    ("judge", 5, "{seconds_judging:.1f}"),
    ("ref", 5, "{seconds_reference:.1f}"),
    ("update", 6, "{seconds_update:.1f}"),
    ("sync", 5, "{seconds_sync:.1f}"),
)
_COST = ("cost", 8, "{judge_cost:.4f}")
"""So far; shown where the judge counts tokens."""


class Console:
    """Prints a run's events as lines."""

    def __init__(self) -> None:
        self._began = time.time()
        self._lines = 0
        self._row: dict[str, Any] | None = None

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.time() - self._began:6.1f} s] {text}", flush=True)

    def show(self, event: dict[str, Any], steps: int) -> None:
        """One event of the run's journal."""
        match event["kind"]:
            case "startup":
                self.say(f"start-up: {event['part'].replace('_', ' ')} ready after {event['seconds']:.1f} s")
            case "evaluation":
                shown = ", ".join(f"{name} {event[name]:.3f}" for name in SHOWN_METRICS if name in event)
                self.say(f"evaluation of version {event['version']}: {shown}")
            case "warning":
                self.say(f"warning: {event['text']}")
            case "step":
                self._flush(steps)
                self._row = event
            case "published":
                if self._row is not None:
                    self._row["seconds_sync"] = event["seconds_sync"]
                self._flush(steps)

    def summary(self, summary: dict[str, Any], folder: RunFolder, state: str) -> None:
        """The end of a run: what changed, and where everything lies."""
        self._flush(summary["policy_version"])
        measured = "; before -> after on held-out prompts:" if summary["after"] else ""
        self.say(f"{state} at policy version {summary['policy_version']}{measured}")
        for name in SHOWN_METRICS:
            if name in summary["after"] and name in summary["before"]:
                print(f"    {name:20} {summary['before'][name]:8.3f} -> {summary['after'][name]:8.3f}")
        if "cost" in summary["judge"]:
            print(f"    judge: {describe_judging(summary['judge'])}")
        if summary["publications"]:
            print(f"    largest probe difference {summary['probe_max_abs_diff']:.2g} nats per token")
        for name in ("report.html", "summary.json", "model"):
            print(f"    {name:14} {folder.url(name)}")
        if state == "stopped":
            print("    go on from here with --resume")

    def _flush(self, steps: int) -> None:
        if self._row is None:
            return
        row = {"seconds_sync": 0.0, "kl": math.nan, **self._row}
        columns = (*_COLUMNS, _COST) if "judge_input_tokens" in row else _COLUMNS
        if self._lines % HEADER_EVERY == 0:
            print(f"{'step':>9} " + " ".join(f"{name:>{width}}" for name, width, _ in columns))
        self._lines += 1
        texts = [(width, shape.format(**row)) for _, width, shape in columns]
        cells = " ".join(f"{'-' if text == 'nan' else text:>{width}}" for width, text in texts)
        print(f"{row['step']:>4}/{steps:<4} {cells}", flush=True)
        self._row = None
