"""The gate: a run is compared with the one that serves, on the prompts that both held out."""

import json
from pathlib import Path
from typing import Any

import pytest

from rl.config import AlignConfig
from rl.store import RunFolder
from serve.gate import Verdict, compare
from serve.settings import GateSettings

CONFIG = AlignConfig()
FEW = GateSettings(prompts=2)


def run(folder: Path, *evaluations: dict[str, Any]) -> RunFolder:
    (folder / "evaluations").mkdir(parents=True)
    for number, evaluation in enumerate(evaluations):
        (folder / f"evaluations/version-{number:05d}.json").write_text(json.dumps({"version": number, **evaluation}))
    return RunFolder(str(folder))


def evaluation(scores: dict[str, tuple[str, float | None]], judge: str = "oracle", **metrics: float) -> dict[str, Any]:
    """An evaluation with an answer and a score for each prompt id."""
    rows = [
        {"prompt_id": id, "answer": text, "judgement": {"score": score, "judge": judge, "prompt_hash": "h"}}
        for id, (text, score) in scores.items()
    ]
    return {"metrics": {"judge_score": 1.0, **metrics}, "answers": rows}


def test_a_run_that_wins_passes_and_one_that_loses_does_not(tmp_path: Path) -> None:
    old = run(tmp_path / "old", evaluation({"p": ("x", 5), "q": ("y", 5), "r": ("z", 5), "s": ("same", 5)}))
    new = run(tmp_path / "new", evaluation({"p": ("a", 9), "q": ("b", 9), "r": ("c", 1), "s": ("same", 5)}))
    won, lost = compare(CONFIG, new, old, FEW), compare(CONFIG, old, new, FEW)
    assert (won.passed, won.figures["win_rate"], won.figures["prompts"]) == (True, 0.625, 4)
    assert lost.figures["win_rate"] == 0.375
    assert lost.faults == ("win rate is 0.375, but gate.win_rate asks for 0.5",)
    assert str(lost) == "gate not passed: win rate 0.375, language accuracy unknown, prompts 4"


def test_what_a_run_ended_with_counts(tmp_path: Path) -> None:
    base, middle, end = ({"p": (name, score)} for name, score in (("base", 3), ("middle", 9), ("end", 1)))
    old = run(tmp_path / "old", evaluation(end), evaluation(base))
    new = run(tmp_path / "new", evaluation(base), evaluation(middle), evaluation(end))
    assert compare(CONFIG, new, old, GateSettings(prompts=1)).figures["win_rate"] == 0.0


def test_prompts_on_which_the_judge_abstained_are_not_counted(tmp_path: Path) -> None:
    old = run(tmp_path / "old", evaluation({"p": ("x", 5), "q": ("y", 5)}))
    new = run(tmp_path / "new", evaluation({"p": ("a", 9), "q": ("b", None)}))
    assert compare(CONFIG, new, old, FEW).faults == ("prompts is 1, but gate.prompts asks for 2",)


@pytest.mark.parametrize(("measured", "passed"), [(0.99, True), (0.9, False), (None, False)])
def test_language_must_not_be_lost_where_that_is_asked_for(
    tmp_path: Path, measured: float | None, passed: bool
) -> None:
    metrics = {} if measured is None else {"language_accuracy": measured}
    both = run(tmp_path / "run", evaluation({"p": ("x", 1), "q": ("y", 1)}, **metrics))
    verdict = compare(CONFIG, both, both, GateSettings(prompts=2, language_accuracy=0.95))
    assert verdict.passed == passed
    assert verdict.figures["language_accuracy"] == measured


def test_too_few_prompts_in_common_and_no_evaluation_at_all_are_said(tmp_path: Path) -> None:
    old = run(tmp_path / "old", evaluation({"p": ("x", 5), "q": ("y", 5)}))
    new = run(tmp_path / "new", evaluation({"p": ("a", 9), "r": ("b", 9)}))
    assert compare(CONFIG, new, old, FEW).faults == ("prompts is 1, but gate.prompts asks for 2",)
    none = run(tmp_path / "none")
    assert compare(CONFIG, none, old, FEW) == Verdict(
        {"win_rate": None, "language_accuracy": None, "prompts": 0},
        (f"{none.address} was not evaluated on held-out prompts",),
    )
    assert "old was not evaluated" not in str(compare(CONFIG, new, none, FEW).faults)


def test_scores_of_different_judges_are_not_mixed_but_answers_judged_again(tmp_path: Path) -> None:
    """By the run's own judge, which here is the oracle; the stored scores say the opposite of the truth."""
    from rl.data import WorldData

    config = AlignConfig(data=WorldData(prompts=1, heldout_scenes=2))
    _, heldout = config.data.load(0, lambda faults: None)
    questions = [prompt for prompt in heldout if (prompt.truth or {})["kind"] == "presence"][:2]
    truth = {prompt.id: (prompt.truth or {})["answer"] for prompt in questions}
    right = {id: (f"{answer}.", 0.0) for id, answer in truth.items()}
    wrong = {id: ("no." if answer == "yes" else "yes.", 12.0) for id, answer in truth.items()}
    old = run(tmp_path / "old", evaluation(wrong, judge="gemini"))
    new = run(tmp_path / "new", evaluation(right, judge="oracle"))
    assert compare(config, new, old, FEW).figures["win_rate"] == 1.0
