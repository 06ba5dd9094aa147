"""What a set of annotated pairs is like: quality.json and report.html of an annotation run.

Keys of quality.json: `prompts`, `completions`, `pairs`, `ties`, `identical`, `unjudged`, `abstentions` and the rates
`pair_rate`, `tie_rate` (of prompts) and `abstention_rate` (of completions); `judge` (tally and cost, and
`order_consistency` and `disagreement_rate` where they were counted); `attributes` (of each its mean and how often each
grade was given); `correlations` (Pearson, between attributes); `margins` (histogram); `length` (tokens: `chosen`,
`rejected`, `chosen_longer` as a rate, `margin_correlation` between difference of length and margin); `duplicates`;
`sources` (prompts and pairs per data set); `similar` (with BDHS: share of the answers that were still like the ground
truth after each try).
"""

import base64
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from rl.annotate import totals
from rl.charts import bar_chart, render_page
from rl.store import RunFolder
from rl.summary import similar_shares
from rl.tables import Answers
from rl.types import Attributes, Pair

GALLERY_SIZE = 24
ABSTENTIONS_SHOWN = 10


def write_quality(folder: RunFolder) -> dict[str, Any]:
    """Make quality.json and report.html from the answers and pairs in the folder; returns the former."""
    batches = [batch for step in folder.steps() if (batch := folder.read_batch(step)) is not None]
    answers = [one for step in folder.steps() for one in folder.read_answers(step) or ()]
    pairs = [pair for batch in batches for pair in batch.pairs]
    result = quality(totals(batches), answers, pairs)
    folder.write_json("quality.json", result)
    folder.write_text("report.html", _page(folder, result, answers, pairs))
    return result


def quality(counts: dict[str, Any], answers: Sequence[Answers], pairs: Sequence[Pair]) -> dict[str, Any]:
    """See the top of this file."""
    judge = {name.removeprefix("judge_"): value for name, value in counts.items() if name.startswith("judge_")}
    for rate, part, whole in (
        ("order_consistency", "order_consistent", "order_checked"), ("disagreement_rate", "disagreement", "compared")
    ):  # fmt: skip
        if judge.get(whole):
            judge[rate] = judge.get(part, 0) / judge[whole]
    names = ("prompts", "completions", "pairs", "ties", "identical", "unjudged", "abstentions")
    own = {name: int(counts.get(name, 0)) for name in names}
    graded = [grades for one in answers for grades in _attributes(one)]
    return own | {
        "pair_rate": own["pairs"] / max(1, own["prompts"]),
        "tie_rate": own["ties"] / max(1, own["prompts"]),
        "abstention_rate": own["abstentions"] / max(1, own["completions"]),
        "judge": judge,
        "attributes": _distributions(graded),
        "correlations": _correlations(graded),
        "margins": dict(sorted(Counter(math.floor(pair.margin * 2) / 2 for pair in pairs).items())),
        "length": _lengths(pairs),
        "duplicates": {
            "prompts": len(answers) - len({one.prompt.id for one in answers}),
            "pairs": len(pairs) - len({(p.prompt.id, *(one.text for one in p.completions)) for p in pairs}),
        },
        "sources": _sources(answers, pairs),
        "similar": similar_shares([counts]),
    }


def _attributes(answers: Answers) -> Iterator[Attributes]:
    for judgement in answers.judgements or ():
        if judgement.attributes is not None:
            yield judgement.attributes


def _distributions(graded: Sequence[Attributes]) -> dict[str, Any]:
    if not graded:
        return {}
    columns = {name: [getattr(one, name) for one in graded] for name in Attributes._fields}
    return {
        name: {"mean": round(fmean(values), 3), "counts": {str(grade): values.count(grade) for grade in range(5)}}
        for name, values in columns.items()
    }


def _correlations(graded: Sequence[Attributes]) -> dict[str, dict[str, float | None]]:
    """None where an attribute never varies."""
    if len(graded) < 2:
        return {}
    columns = np.array(graded, dtype=float)
    varies = columns.std(0) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.corrcoef(columns.T)
    fields = Attributes._fields
    return {
        one: {
            other: round(float(matrix[i, j]), 3) if varies[i] and varies[j] else None for j, other in enumerate(fields)
        }
        for i, one in enumerate(fields)
    }


def _lengths(pairs: Sequence[Pair]) -> dict[str, float | None]:
    if not pairs:
        return {}
    chosen, rejected = (
        np.array([len(getattr(pair.completions, side).token_ids) for pair in pairs]) for side in ("chosen", "rejected")
    )
    margins = np.array([pair.margin for pair in pairs])
    longer = chosen - rejected
    varies = len(pairs) > 1 and longer.std() > 0 and margins.std() > 0
    return {
        "chosen": round(float(chosen.mean()), 2),
        "rejected": round(float(rejected.mean()), 2),
        "chosen_longer": round(float((longer > 0).mean() + (longer == 0).mean() / 2), 3),
        "margin_correlation": round(float(np.corrcoef(longer, margins)[0, 1]), 3) if varies else None,
    }


def _sources(answers: Sequence[Answers], pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    asked = Counter(one.prompt.source for one in answers)
    made = Counter(pair.prompt.source for pair in pairs)
    return {source: {"prompts": count, "pairs": made[source]} for source, count in sorted(asked.items())}


def _page(folder: RunFolder, result: dict[str, Any], answers: Sequence[Answers], pairs: Sequence[Pair]) -> str:
    grades = {name: one["counts"] for name, one in result["attributes"].items()}
    lengths = {
        side: Counter(str(len(getattr(pair.completions, side).token_ids) // 4 * 4) for pair in pairs)
        for side in ("chosen", "rejected")
    }
    found = [int(length) for bars in lengths.values() for length in bars]
    known = range(min(found), max(found) + 1, 4) if found else ()
    ordered = {side: {str(length): bars.get(str(length), 0) for length in known} for side, bars in lengths.items()}
    margins = {f"{margin:g}": count for margin, count in result["margins"].items()}
    charts = [
        bar_chart("Grades", "grade", "answers", grades),
        bar_chart("Margins", "score of chosen less rejected", "pairs", {"pairs": margins}),
        bar_chart("Length", "tokens, in groups of 4", "pairs", ordered),
    ]
    reasons = Counter(
        judgement.reason for one in answers for judgement in one.judgements or () if judgement.score is None
    )
    return render_page(
        "quality.html.j2",
        name=folder.address.rstrip("/").rpartition("/")[2],
        q=result,
        charts=[chart for chart in charts if chart],
        fields=Attributes._fields,
        gallery=[_entry(pair) for pair in _shown(pairs)],
        abstentions=reasons.most_common(ABSTENTIONS_SHOWN),
        config=folder.read_text("config.yaml"),
    )


def _shown(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs from the whole range of margins, the narrowest first: those are the ones to doubt."""
    ordered = sorted(pairs, key=lambda pair: pair.margin)
    if len(ordered) <= GALLERY_SIZE:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (GALLERY_SIZE - 1))] for index in range(GALLERY_SIZE)]


def _entry(pair: Pair) -> dict[str, Any]:
    images = [base64.b64encode(image.png).decode() for image in pair.prompt.images[:1]]
    return {"pair": pair, "image": images[0] if images else None}
