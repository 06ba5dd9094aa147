"""Supervised strategies: which answers each of them learns from."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cluster.errors import ConfigError, DataError
from rl.answers import AnswerSettings
from rl.store import RunFolder
from rl.tables import Answers
from rl.types import WRITTEN, Attributes, Judgement, PairBatch
from tests.conftest import make_completion, make_prompt


def judged(text: str, score: float | None, attributes: Attributes | None = None):
    return make_completion(text), Judgement(score, attributes, "because", "test", "hash")


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Two prompts: one with three judged answers, of which one is an abstention; one with none judged."""
    good, bad = Attributes(4, 4, 4, 2, 1), Attributes(1, 0, 4, 2, 3)
    first = [judged("good", 12, good), judged("unknown", None), judged("bad", 5, bad)]
    second = [judged("nobody knows", None), judged("neither", None)]
    folder = RunFolder(str(tmp_path))
    answers = [
        Answers(make_prompt(text), tuple(one for one, _ in group), tuple(verdict for _, verdict in group))
        for text, group in (("a", first), ("b", second))
    ]
    folder.write_answers(1, answers)
    folder.write_batch(PairBatch(1, (), 2))
    return str(tmp_path)


def epoch(count: int, seed: int = 0, **fields: Any) -> list[tuple[str, str]]:
    settings = TypeAdapter[Any](AnswerSettings).validate_python(fields)
    return [
        (prompt.text, answer)
        for prompt, answer in itertools.islice(settings.examples(seed, lambda faults: None), count)
    ]


def test_rejection_sampling_learns_the_best_answer_of_each_judged_prompt(run: str) -> None:
    assert epoch(3, kind="best", path=run) == [("a", "good")] * 3


def test_steerlm_asks_for_the_grades_each_answer_has(run: str) -> None:
    template = "{helpfulness} {correctness} {verbosity}"
    examples = epoch(2, kind="steerlm", path=run, template=template)
    assert sorted(examples) == [("a \n1 0 3", "bad"), ("a \n4 4 1", "good")]


@pytest.mark.parametrize("template", ["no names", "{helpfulness} {beauty}"])
def test_a_template_that_names_no_or_unknown_attributes_is_refused(run: str, template: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.template"):
        epoch(1, kind="steerlm", path=run, template=template)


def test_standard_sft_learns_the_reference_answers(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "answer": "1"}\n{"prompt": "two"}\n')
    source = {"kind": "files", "train": str(tmp_path / "p.jsonl"), "heldout_share": 0}
    assert epoch(2, kind="reference", prompts=source) == [("one", "1")] * 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "two"}\n')
    with pytest.raises(DataError, match="no prompt has a reference answer"):
        epoch(1, kind="reference", prompts=source)


def test_an_epoch_has_every_example_once(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    one, verdict = judged("good", 12)
    answers = [Answers(make_prompt(str(index)), (one,), (verdict,)) for index in range(8)]
    folder.write_answers(1, answers)
    folder.write_batch(PairBatch(1, (), 8))
    first = epoch(8, kind="best", path=str(tmp_path))
    assert sorted(first) == [(str(index), "good") for index in range(8)]
    assert first != epoch(8, seed=1, kind="best", path=str(tmp_path))


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no judged answers"):
        epoch(1, kind="best", path=str(tmp_path))


def test_answers_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    group = [judged("good", 12, Attributes(4, 4, 4, 2, 1)), judged("unknown", None)]
    whole = Answers(make_prompt("a", truth={"kind": "x"}, source="here"), *zip(*group, strict=True))  # type: ignore[arg-type]
    unjudged = dataclasses.replace(whole, judgements=None)
    for one in (whole, unjudged):
        folder.write_answers(1, [one])
        (read,) = folder.read_answers(1) or []
        prompt_id = read.prompt.id
        assert read.prompt == one.prompt
        assert read.judgements == one.judgements
        assert read.completions == tuple(
            dataclasses.replace(completion, prompt_id=prompt_id) for completion in one.completions
        )


def test_answers_that_were_cut_off_do_not_count(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.write_answers(1, [Answers(make_prompt("a"), (make_completion(),))])
    file = tmp_path / "answers" / "step-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    assert folder.read_answers(1) is None


def test_where_the_judge_abstained_on_everything_there_is_no_best(tmp_path: Path) -> None:
    one, verdict = judged("unknown", None)
    RunFolder(str(tmp_path)).write_answers(1, [Answers(make_prompt(), (one,), (verdict,))])
    RunFolder(str(tmp_path)).write_batch(PairBatch(1, (), 1))
    with pytest.raises(DataError, match="the judge abstained on all answers"):
        epoch(1, kind="best", path=str(tmp_path))


def test_a_reference_answer_is_never_the_best_sampled_one(tmp_path: Path) -> None:
    sampled, verdict = judged("sampled", 5)
    written, better = judged("written", 12)
    written = dataclasses.replace(written, finish_reason=WRITTEN)
    RunFolder(str(tmp_path)).write_answers(1, [Answers(make_prompt(), (sampled, written), (verdict, better))])
    RunFolder(str(tmp_path)).write_batch(PairBatch(1, (), 1))
    assert epoch(1, kind="best", path=str(tmp_path)) == [("What do you see?", "sampled")]
