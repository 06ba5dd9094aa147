"""Whole runs of the regimes beside the online one: where their pairs come from, and which reference scores them."""

import json
import math
from pathlib import Path

import pytest

from tests.e2e.conftest import Cluster, logs, pairs_of, raylign, rows, summary

LN2 = pytest.approx(math.log(2), abs=2e-4)  # what DPO costs where policy and reference are the same


def align(cluster: Cluster, config: Path, folder: Path, *overrides: str) -> None:
    outcome = raylign("align", str(config), f"run.dir={folder}", f"cluster.address={cluster.address}", *overrides)
    assert outcome.code == 0, outcome.output + logs(folder)


def test_offline_bdhs_needs_no_judge_and_tells_how_many_answers_stayed_alike(blind_set: Path) -> None:
    quality = json.loads((blind_set / "quality.json").read_text())
    assert quality["judge"].get("calls", 0) == 0
    similar = quality["similar"]
    assert len(similar) == 5
    assert 1 > similar[0] >= similar[1] >= similar[2] >= similar[3], "a try leaves fewer answers that are alike"
    assert "answers still like the given one after try 5" in (blind_set / "report.html").read_text()
    made = pairs_of(blind_set, 1)
    assert {pair.source for pair in made} == {"bdhs"}
    assert all(pair.completions.chosen.text == pair.prompt.reference_answer for pair in made)
    assert all(pair.completions.rejected.text != pair.completions.chosen.text for pair in made)


def test_averaged_with_masked_sight_an_adapter_and_a_reference_that_follows(
    cluster: Cluster, small_config: Path, blind_set: Path, tmp_path: Path
) -> None:
    """The reference becomes the policy after step 2, adapter and all, so step 3 costs what step 1 did."""
    folder = tmp_path / "run"
    second = "{kind: bdhs, sight: mask, threshold: 0.75, tries: 2}"
    align(
        cluster, small_config, folder,
        f"pairs={{kind: averaged, stored: {{path: {blind_set}}}, second: {second}, stored_weight: 0.25}}",
        "policy.lora={rank: 8, alpha: 64}", "learner.optimizer.learning_rate=3e-3", "loop.max_lag=0",
        "reference={update: average, every: 2, share: 1.0}",
    )  # fmt: skip
    losses = [row["loss"] for row in rows(folder)]
    assert losses[0] == LN2
    assert losses[1] != LN2
    assert losses[2] == LN2
    assert [row["lag_max"] for row in rows(folder)] == [0, 0, 0], "strictly on policy"
    first, third = pairs_of(folder, 1), pairs_of(folder, 3)
    assert {(pair.source, pair.weight) for pair in first} <= {("offline", 0.25), ("bdhs", 0.75), ("offline", 1.0)}
    assert {pair.source for pair in first} == {"offline", "bdhs"}
    assert {pair.reference_version for pair in third} == {f"{first[0].reference_version}+2"}
    assert len(summary(folder)["similar"]) == 2
    assert "Age of the pairs" in (folder / "report.html").read_text()


def test_rounds_renew_the_reference_and_a_resumed_run_has_the_one_it_had(
    cluster: Cluster, small_config: Path, tmp_path: Path
) -> None:
    """Rounds of one step, learned from twice, with the lag that this brings weighted; resumed in the second round."""
    folder = tmp_path / "run"
    rounds = (
        "pairs={kind: iterative, steps_per_round: 1, epochs: 2, margin: 1}", "reference.update=round",
        "loop.stale=weight", "loop.max_lag=0",
    )  # fmt: skip
    align(cluster, small_config, folder, *rounds, "loop.steps=3")
    align(cluster, small_config, folder, *rounds, "loop.steps=5", "--resume")
    losses = [row["loss"] for row in rows(folder)]
    assert [losses[0], losses[2], losses[4]] == [LN2] * 3, "a round starts from its reference"
    assert losses[1] != LN2
    assert losses[3] != LN2
    assert [row["lag_max"] for row in rows(folder)] == [0, 1, 0, 1, 0]
    assert [row["stale"] for row in rows(folder)] == [
        0,
        *(len(pairs_of(folder, s)) * (s % 2 == 0) for s in range(2, 6)),
    ]
    for first in (1, 3):
        ids = [sorted(pair.prompt.id for pair in pairs_of(folder, step)) for step in (first, first + 1)]
        assert ids[0] == ids[1], "the second epoch has the pairs of the first"
        versions = {pair.reference_version for step in (first, first + 1) for pair in pairs_of(folder, step)}
        assert len(versions) == 1
        scores = [
            {pair.prompt.id: pair.reference_logps for pair in pairs_of(folder, step)} for step in (first, first + 1)
        ]
        for id, logps in scores[0].items():
            for before, after in zip(logps or (), scores[1][id] or (), strict=True):
                assert after == pytest.approx(before, abs=1e-4), "the reference came back with its weights"
