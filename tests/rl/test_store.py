"""The run folder: what is written comes back, on disks and behind fsspec alike."""

import dataclasses
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cluster.errors import DataError
from rl.formats import Fault
from rl.store import RunFolder, evaluation_file, read_evaluations
from rl.types import Extra, PairBatch, PairValues
from tests.conftest import make_completion, make_pair, make_prompt


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    address = str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4()}/run"
    folder = RunFolder(address)
    folder.create(overwrite=False, resume=False)
    return folder


def test_pairs_come_back_as_they_were_written(folder: RunFolder) -> None:
    scored = make_pair(
        reference_logps=PairValues((-1.5, 0.0), (-2.25, -1.0, -0.5)),
        reference_version="v",
        prompt=make_prompt(truth={"a": [1]}),
        weight=0.25,
    )
    other = make_completion("other.", (8, 2), 0, scored.prompt.id)
    scored = dataclasses.replace(scored, extras=(Extra("sample", other, (-0.5, -0.25)), Extra("mismatched", other)))
    text_only = make_pair(prompt=make_prompt("How are you?", None, reference_answer="well"))
    batch = PairBatch(7, (scored, text_only), 96, {"ties": 2}, {"sampling": 1.5})
    folder.write_batch(batch)
    assert folder.read_batch(7) == batch


def test_a_step_without_its_last_file_does_not_count(folder: RunFolder) -> None:
    folder.write_batch(PairBatch(1, (make_pair(),), 1))
    folder.filesystem.rm(folder.path("pairs/step-00001.json"))
    assert folder.read_batch(1) is None


def test_rows_are_appended_and_cut_back_on_resume(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        folder.append_row("metrics.jsonl", {"step": step})
        folder.write_json(evaluation_file(step), {"version": step})
    folder.cut_back(2)
    assert folder.rows("metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert [one["version"] for one in read_evaluations(folder)] == [1, 2]


def test_a_folder_is_uploaded_with_its_subfolders_and_replaces_the_one_before(
    folder: RunFolder, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    (local / "deep").mkdir(parents=True)
    (local / "deep" / "a.txt").write_text("new")
    folder.write_text("model/old.txt", "old")
    folder.upload(local, "model")
    assert not folder.exists("model/old.txt")
    assert folder.filesystem.cat_file(folder.path("model/deep/a.txt")) == b"new"


def begin(folder: RunFolder, state: str = "finished") -> None:
    """What a run leaves that has made its first pairs."""
    folder.write_text("config.yaml", "seed: 0")
    folder.write_json("status.json", {"state": state})
    folder.write_text("pairs/step-00001.json", "{}")


def test_a_run_is_only_overwritten_when_asked(folder: RunFolder) -> None:
    begin(folder)
    with pytest.raises(DataError, match=r"is not empty.*--resume.*--overwrite"):
        folder.create(overwrite=False, resume=False)
    folder.create(overwrite=False, resume=True)
    assert folder.exists("config.yaml")
    folder.create(overwrite=True, resume=False)
    assert not folder.exists("config.yaml")


def test_a_replaced_run_comes_back_if_the_new_one_comes_to_nothing(folder: RunFolder) -> None:
    begin(folder)
    folder.create(overwrite=True, resume=False)
    folder.write_text("config.yaml", "seed: 1")
    folder.restore_replaced()
    assert folder.read_text("config.yaml") == "seed: 0"
    assert folder.exists("pairs/step-00001.json")


def test_a_replaced_run_is_gone_once_the_new_one_is_under_way(folder: RunFolder) -> None:
    begin(folder)
    folder.create(overwrite=True, resume=False)
    folder.discard_replaced()
    folder.restore_replaced()
    assert not folder.exists("config.yaml")


@pytest.mark.parametrize("names", [["thesis.txt"], ["config.yaml", "pairs/mine.txt"], ["status.json"]])
def test_a_folder_that_is_no_run_is_never_overwritten(folder: RunFolder, names: list[str]) -> None:
    for name in names:
        folder.write_text(name, "years of work")
    with pytest.raises(DataError, match="not a run folder"):
        folder.create(overwrite=True, resume=False)
    assert all(folder.read_text(name) == "years of work" for name in names)


def test_nothing_to_resume_is_said(folder: RunFolder) -> None:
    with pytest.raises(DataError, match="no run to resume"):
        folder.create(overwrite=False, resume=True)


def test_a_run_that_failed_before_its_first_pairs_is_replaced(folder: RunFolder) -> None:
    folder.write_text("config.yaml", "seed: 0")
    folder.write_json("status.json", {"state": "failed"})
    folder.create(overwrite=False, resume=False)
    assert not folder.exists("config.yaml")


def test_rows_keep_their_characters_and_half_ones_do_no_harm(folder: RunFolder) -> None:
    folder.append_row("metrics.jsonl", {"reason": "größer"})
    folder.append_row("metrics.jsonl", {"reason": "\ud83d"})
    assert "größer" in folder.read_text("metrics.jsonl")
    assert [row["reason"] for row in folder.rows("metrics.jsonl")] == ["größer", "\ud83d"]


def test_a_folder_that_another_process_writes_is_left_alone(folder: RunFolder) -> None:
    """One whose writer was killed is not."""
    code = (
        "import sys, time\nfrom rl.store import RunFolder\nfolder = RunFolder(sys.argv[1])\n"
        "folder.write_text('config.yaml', '')\nfolder.set_state('running')\nprint(flush=True)\ntime.sleep(60)"
    )
    if not folder.is_local:
        pytest.skip("another process cannot write into this one's memory")
    with subprocess.Popen([sys.executable, "-c", code, folder.address], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        for overwrite, resume in ((True, False), (False, True)):
            with pytest.raises(DataError, match=f"written by process {writer.pid}"):
                folder.create(overwrite, resume)
        writer.kill()
    folder.create(overwrite=False, resume=True)


def test_a_row_that_a_crash_cut_off_does_not_count(folder: RunFolder) -> None:
    folder.append_row("metrics.jsonl", {"step": 1})
    whole = folder.read_text("metrics.jsonl")
    folder.write_text("metrics.jsonl", whole + '{"step": 2, "lo')
    assert folder.rows("metrics.jsonl") == [{"step": 1}]


def test_bad_rows_are_listed_anew_by_every_process_and_stay_when_a_run_comes_back(folder: RunFolder) -> None:
    begin(folder)
    folder.list_faults([Fault("p.jsonl", 1, "old")])
    new = RunFolder(folder.address)
    new.create(overwrite=True, resume=False)
    assert new.list_faults([Fault("p.jsonl", 2, "empty")]).startswith("1 row cannot be used")
    new.list_faults([Fault("q.jsonl", 3, "empty")])
    new.restore_replaced()
    assert [row["row"] for row in folder.rows("bad-rows.jsonl")] == [2, 3]
    assert folder.read_text("config.yaml") == "seed: 0"
