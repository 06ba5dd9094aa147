"""The quality report of a pair set, against counts made by hand."""

import dataclasses
from pathlib import Path

import pytest

from rl.annotate import totals
from rl.quality import quality, write_quality
from rl.store import RunFolder
from rl.tables import Answers
from rl.types import Attributes, Judgement, Pair, PairBatch, PairValues
from tests.conftest import make_completion, make_pair, make_prompt


def graded(*grades: int) -> Judgement:
    attributes = Attributes(*grades)
    return Judgement(float(sum(grades[:3])), attributes, "because", "test", "hash")


def sized(prompt: str, chosen: int, rejected: int, margin: float) -> Pair:
    completions = PairValues(
        make_completion("long", tuple(range(chosen))), make_completion("short", tuple(range(rejected)))
    )
    return dataclasses.replace(make_pair(prompt=make_prompt(prompt)), completions=completions, margin=margin)


COUNTS = {
    "prompts": 4, "completions": 8, "pairs": 2, "ties": 1, "identical": 0, "unjudged": 1, "abstentions": 2,
    "judge_cost": 1.5, "judge_order_checked": 8, "judge_order_consistent": 6,
}  # fmt: skip


def test_rates_are_counts_over_what_they_are_rates_of() -> None:
    result = quality(COUNTS, [], [])
    assert (result["pair_rate"], result["tie_rate"], result["abstention_rate"]) == (0.5, 0.25, 0.25)
    assert result["judge"]["order_consistency"] == 0.75
    assert result["judge"]["cost"] == 1.5


def test_attributes_are_counted_and_correlated() -> None:
    group = (make_completion("a"), make_completion("b"), make_completion("c"))
    verdicts = (graded(4, 4, 4, 1, 0), graded(2, 2, 4, 1, 4), graded(0, 0, 4, 1, 2))
    result = quality(COUNTS, [Answers(make_prompt(), group, verdicts)], [])
    assert result["attributes"]["helpfulness"] == {"mean": 2.0, "counts": {"0": 1, "1": 0, "2": 1, "3": 0, "4": 1}}
    assert result["correlations"]["helpfulness"]["correctness"] == 1.0
    assert result["correlations"]["helpfulness"]["verbosity"] == -0.5
    assert result["correlations"]["helpfulness"]["coherence"] is None


def test_a_judge_that_loves_length_shows() -> None:
    pairs = [sized("a", 10, 2, 8.0), sized("b", 6, 4, 2.0), sized("c", 3, 3, 1.0)]
    result = quality(COUNTS, [], pairs)
    assert result["length"]["chosen"] == pytest.approx(19 / 3, abs=0.01)
    assert result["length"]["chosen_longer"] == pytest.approx(2.5 / 3, abs=1e-3)
    assert result["length"]["margin_correlation"] > 0.9
    assert result["margins"] == {1.0: 1, 2.0: 1, 8.0: 1}


def test_duplicates_and_sources_are_counted() -> None:
    prompts = [make_prompt("a", source="x"), make_prompt("a", source="x"), make_prompt("b", source="y")]
    answers = [Answers(prompt, (make_completion(),)) for prompt in prompts]
    pairs = [make_pair(prompt=prompts[0]), make_pair(prompt=prompts[1])]
    result = quality(COUNTS, answers, pairs)
    assert result["duplicates"] == {"prompts": 1, "pairs": 1}
    assert result["sources"] == {"x": {"prompts": 2, "pairs": 2}, "y": {"prompts": 1, "pairs": 0}}


def test_the_page_escapes_what_it_shows_and_needs_no_network(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_text("config.yaml", "seed: 0")
    prompt = make_prompt("<script>alert(1)</script>")
    folder.write_answers(1, [Answers(prompt, (make_completion("a"),), (graded(4, 4, 4, 1, 0),))])
    folder.write_batch(PairBatch(1, (make_pair(prompt=prompt),), 1, {"pairs": 1, "prompts": 1}))
    write_quality(folder)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert (tmp_path / "quality.json").is_file()


def test_what_judging_took_is_that_of_the_last_step() -> None:
    """Also where a cache answered everything and no call was made."""
    batches = [PairBatch(step, (), 8, {"prompts": 8}, {}, {"calls": 0, "cached": 8 * step}) for step in (1, 2, 3)]
    assert totals(batches)["judge_cached"] == 24
