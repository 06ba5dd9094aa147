"""Stored pairs for offline alignment: other formats, other tokens, held-out images, ablations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.errors import DataError
from rl.formats import Fault
from rl.policy import load_processor, resolve_model
from rl.render import written_completion
from rl.store import RunFolder
from rl.stored import OfflinePairs, ablate
from rl.types import PairBatch, PairValues, Prompt
from rl.world.scenes import draw_scene
from tests.conftest import make_pair, make_prompt


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(resolve_model("rl/world/base"))


def load(processor: Any, heldout: list[Prompt] | None = None, faults: list[Fault] | None = None, **fields: object):
    settings = OfflinePairs.model_validate({"kind": "offline", **fields})
    return settings.load("pairs", 0, processor, 128, heldout or [], (faults if faults is not None else []).extend)


def world_pairs(processor: Any, count: int):
    rng = np.random.default_rng(0)
    for _ in range(count):
        prompt = make_prompt("What do you see?", draw_scene(rng))
        chosen, rejected = (written_completion(prompt, text, processor) for text in ("a red circle", "nothing."))
        yield dataclasses.replace(make_pair(prompt=prompt, version=7), completions=PairValues(chosen, rejected))


def write_run(path: Path, pairs) -> Path:
    folder = RunFolder(str(path))
    folder.write_batch(PairBatch(1, tuple(pairs), 0))
    return path


def test_the_pairs_of_a_run_come_back_as_offline_pairs(processor, tmp_path: Path) -> None:
    stored = list(world_pairs(processor, 3))
    loaded = load(processor, path=str(write_run(tmp_path / "run", stored)))
    assert [pair.completions for pair in loaded] == [
        PairValues(*(dataclasses.replace(one, policy_version=7) for one in pair.completions)) for pair in stored
    ]
    assert {(pair.source, pair.policy_version) for pair in loaded} == {("offline", 0)}


def test_pairs_in_other_tokens_are_written_anew_and_lose_the_reference_scores(processor, tmp_path: Path) -> None:
    (stored,) = world_pairs(processor, 1)
    foreign = PairValues(*(dataclasses.replace(one, token_ids=(1, 2, 3)) for one in stored.completions))
    changed = dataclasses.replace(stored, completions=foreign, reference_logps=PairValues((-1.0,) * 3, (-2.0,) * 3))
    (pair,) = load(processor, path=str(write_run(tmp_path / "run", [changed])))
    assert [one.token_ids for one in pair.completions] == [one.token_ids for one in stored.completions]
    assert pair.reference_logps is None


def test_a_preference_set_in_another_format_is_tokenised(processor, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    row = {"prompt": "what do you see?", "chosen": "a red circle.", "rejected": "nothing.", "images": ["a.png"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    (pair,) = load(processor, path=str(tmp_path / "p.jsonl"), format="trl")
    assert (pair.source, pair.margin) == ("offline", 1)
    assert pair.completions.chosen == written_completion(pair.prompt, "a red circle.", processor)


def test_graded_answers_make_pairs_by_the_rule(processor, tmp_path: Path) -> None:
    grades = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    rows = [
        {"prompt": "sort: b c", "response": answer, "helpfulness": helpfulness, **grades}
        for answer, helpfulness in (("b c.", 4), ("c b.", 1), ("b.", 3))
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"path": str(tmp_path / "h.jsonl"), "format": "helpsteer"}
    (pair,) = load(processor, choose={"margin": 2}, **fields)
    assert [one.text for one in pair.completions] == ["b c.", "c b."]
    assert len(load(processor, choose={"margin": 1, "rule": "all_pairs"}, **fields)) == 3


def test_pairs_about_a_held_out_image_are_left_out(processor, tmp_path: Path) -> None:
    stored = list(world_pairs(processor, 3))
    path = str(write_run(tmp_path / "run", stored))
    kept = load(processor, [stored[1].prompt], path=path)
    assert [pair.prompt.id for pair in kept] == [stored[0].prompt.id, stored[2].prompt.id]
    with pytest.raises(DataError, match=r"gives no pair \(3 rows about a held-out image\)"):
        load(processor, [pair.prompt for pair in stored], path=path)


def test_a_pair_that_is_too_long_is_refused_or_skipped_by_number(processor, tmp_path: Path) -> None:
    stored = list(world_pairs(processor, 2))
    long = dataclasses.replace(stored[1].completions.chosen, text="red " * 200)
    long = written_completion(stored[1].prompt, long.text, processor)
    stored[1] = dataclasses.replace(stored[1], completions=PairValues(long, stored[1].completions.rejected))
    path = str(write_run(tmp_path / "run", stored))
    with pytest.raises(DataError, match=r"step 1 row 2: the pair takes \d+ tokens, but policy.max_length is 128"):
        load(processor, path=path)
    faults: list[Fault] = []
    assert len(load(processor, path=path, bad_rows="skip", faults=faults)) == 1
    assert [fault.row for fault in faults] == [2]


def test_a_folder_without_pairs_is_refused(processor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder with pairs"):
        load(processor, path=str(tmp_path))


def test_a_fraction_is_drawn_and_a_share_of_it_flipped() -> None:
    pairs = [make_pair(prompt=make_prompt(str(index), None)) for index in range(100)]
    assert ablate(pairs, 1.0, 0.0, 0) == pairs
    half = ablate(pairs, 0.5, 0.25, 0)
    assert len(half) == 50
    turned = [pair for pair in half if pair.margin < 0]
    assert len(turned) == 12
    assert all(pair.completions.chosen.text == "bad." and pair.judgements.chosen.score == 4 for pair in turned)
    assert ablate(pairs, 0.5, 0.25, 0) == half
    assert ablate(pairs, 0.5, 0.25, 1) != half
    kept = {pair.prompt.id for pair in half}
    assert kept == {pair.prompt.id for pair in ablate(pairs, 0.5, 0.0, 0)}


def test_rows_of_which_no_pair_comes_are_told(processor, tmp_path: Path) -> None:
    rows = [{"prompt": "sort: b c", "chosen": "b c.", "rejected": "b c."}] * 2
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"gives no pair \(2 rows whose answers are the same\)"):
        load(processor, path=str(tmp_path / "t.jsonl"), format="trl")


def test_a_long_pair_is_named_by_its_row_in_the_file(processor, tmp_path: Path) -> None:
    """Whatever was passed over before it."""
    rows = [{"prompt": "sort: b c", "chosen": "b c.", "rejected": answer} for answer in ("c.", "b c.", "red " * 200)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"t\.jsonl row 3: the pair takes"):
        load(processor, path=str(tmp_path / "t.jsonl"), format="trl", start=1)
