"""report.html: one self-contained page about a run, to be opened offline."""

import base64
from typing import Any

from rl.charts import bar_chart, line_chart, render_page
from rl.store import RunFolder, read_evaluations
from rl.summary import describe_judging

GALLERY_SIZE = 24

# What the table of the report calls each metric, and whether more of it is better (None: neither).
TABLE: tuple[tuple[str, str, bool | None], ...] = (
    ("chair_s", "Descriptions with an invented object (CHAIR per sentence)", False),
    ("chair_i", "Invented among named objects (CHAIR per object)", False),
    ("object_recall", "Object recall", True),
    ("pope_accuracy", "POPE accuracy", True),
    ("pope_precision", "POPE precision", True),
    ("pope_recall", "POPE recall", True),
    ("pope_f1", "POPE F1", True),
    ("pope_yes", "POPE share of yes", None),
    ("pope_random_f1", "POPE F1, random negatives", True),
    ("pope_popular_f1", "POPE F1, popular negatives", True),
    ("pope_adversarial_f1", "POPE F1, adversarial negatives", True),
    ("count_accuracy", "Counting accuracy", True),
    ("place_accuracy", "Place accuracy", True),
    ("language_accuracy", "Language accuracy", True),
    ("judge_score", "Judge score (0 to 12)", True),
    ("win_rate", "Win rate against the base (ties half)", True),
    ("mean_length", "Mean length of an answer, tokens", None),
)
RATES = tuple(name for name, _, _ in TABLE if name not in ("judge_score", "mean_length"))
CARDS = ("chair_s", "object_recall", "pope_f1", "language_accuracy", "win_rate")

# Title, y label, and what is drawn: (column of metrics.jsonl or of the evaluations, its name in the legend).
STEP_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "per pair", (("loss", "loss"),)),
    ("Reward accuracy", "share of pairs", (("accuracy", "chosen over rejected"),)),
    (
        "Rewards",
        "beta x log-ratio, nats",
        (("reward_margin", "margin"), ("reward_chosen", "chosen"), ("reward_rejected", "rejected")),
    ),
    ("KL to the reference", "nats per token", (("kl", "estimate on pairs"),)),
    ("Length of completions", "tokens", (("mean_length", "all completions"), ("pair_length", "in pairs"))),
    ("Pairs of a step", "prompts", (("pairs", "pairs"), ("ties", "ties"), ("identical", "identical"))),
    ("Lag", "policy versions", (("lag", "mean"), ("lag_max", "largest"))),
    (
        "Time by phase",
        "seconds",
        tuple((f"seconds_{n}", n) for n in ("sampling", "judging", "reference", "update", "waiting", "sync")),
    ),
)
EVALUATION_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Hallucination", "share", (("chair_s", "CHAIR per sentence"), ("chair_i", "CHAIR per object"))),
    ("Object recall", "share", (("object_recall", "object recall"),)),
    ("POPE", "share", (("pope_f1", "F1"), ("pope_accuracy", "accuracy"), ("pope_yes", "says yes"))),
    ("Language accuracy", "share", (("language_accuracy", "copy, reverse, sort, sum"),)),
)


def write_report(folder: RunFolder) -> None:
    """Make report.html from what the run folder holds.

    Raises:
        DataError: the folder has no summary.json, so it is not a run that ended.
    """
    summary = folder.read_json("summary.json")
    evaluations = read_evaluations(folder)
    syncs = {row["step"]: row["seconds_sync"] for row in folder.rows("publications.jsonl")}
    rows = [{"seconds_sync": syncs.get(row["step"], 0.0), **row} for row in folder.rows("metrics.jsonl")]
    charts = [line_chart(title, label, rows, "step", lines) for title, label, lines in STEP_CHARTS]
    points = [{"version": one["version"], **one["metrics"]} for one in evaluations]
    charts = [line_chart(title, label, points, "version", lines) for title, label, lines in EVALUATION_CHARTS] + charts
    lags, similar = summary["lags"], enumerate(summary["similar"], start=1)
    charts.append(bar_chart("Age of the pairs", "versions behind the learner", "pairs", {"pairs": lags}))
    shares = {f"try {number}": share for number, share in similar}
    charts.append(bar_chart("Answers still like the given one", "", "share", {"similar": shares} if shares else {}))
    page = render_page(
        "report.html.j2",
        name=folder.address.rstrip("/").rpartition("/")[2],
        summary=summary,
        cards=[row for row in _table(summary) if row["key"] in CARDS],
        table=_table(summary),
        charts=[chart for chart in charts if chart],
        gallery=_gallery(folder, evaluations[0], evaluations[-1]) if evaluations else [],
        judging=describe_judging(summary["judge"]) if summary["judge"] else "",
        config=folder.read_text("config.yaml"),
    )
    folder.write_text("report.html", page)


def _table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, label, more_is_better in TABLE:
        if name in summary["after"] and name in summary["before"]:
            scale, digits = (100, 1) if name in RATES else (1, 2)
            before, after = (round(scale * summary[when][name], digits) for when in ("before", "after"))
            change = after - before
            verdict = (
                "same" if more_is_better is None or not change else "good" if (change > 0) == more_is_better else "bad"
            )
            shown = [f"{value:.{digits}f}" + (" %" if name in RATES else "") for value in (before, after)]
            points = f"{change:+.{digits}f}" + (" points" if name in RATES else "")
            rows.append(
                {
                    "key": name,
                    "label": label,
                    "before": shown[0],
                    "after": shown[1],
                    "change": points,
                    "verdict": verdict,
                }
            )
    return rows


def _gallery(folder: RunFolder, base: dict[str, Any], aligned: dict[str, Any]) -> list[dict[str, Any]]:
    """Pictures with both answers and verdicts: answers that changed first, the largest changes of score leading."""
    before = {row["prompt_id"]: row for row in base["answers"]}
    entries = []
    for row in aligned["answers"]:
        image = f"evaluations/images/{row['image']}.png"
        old = before.get(row["prompt_id"])
        if old is None or (row["image"] is not None and not folder.exists(image)):
            continue
        change = (row["judgement"]["score"] or 0) - (old["judgement"]["score"] or 0)
        png = base64.b64encode(folder.filesystem.cat_file(folder.path(image))).decode() if row["image"] else None
        entries.append({"question": row["question"], "image": png, "old": old, "new": row, "change": change})
    entries.sort(key=lambda entry: (entry["change"] == 0, -abs(entry["change"])))
    worse = [entry for entry in entries if entry["change"] < 0]
    shown = entries[:GALLERY_SIZE]
    missing = [entry for entry in worse[:4] if entry not in shown]  # what got worse is never hidden
    return shown[: GALLERY_SIZE - len(missing)] + missing
