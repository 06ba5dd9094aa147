"""The registry: which version is aligned, which are served, and which slot holds which."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import DataError
from serve.versions import Candidate, Registry, RegistryFile, Version, assign, stages, weights_digest


def whole(name: str) -> Version:
    return Version(name, f"/models/{name}", "abc", f"/runs/{name}")


def registry(*names: str, promoted: tuple[str, ...] = (), candidate: Candidate | None = None) -> Registry:
    versions = {name: whole(name) for name in names}
    return Registry(Version("base", "/models/base", "000"), "float32", 128, 1, versions, promoted, candidate)


def test_before_anything_is_promoted_the_base_is_aligned() -> None:
    assert registry("a").aligned.name == "base"


def test_promotions_stack_up_and_are_taken_back_one_by_one() -> None:
    twice = registry("a", "b").promote("a").promote("b")
    assert twice.aligned.name == "b"
    assert twice.roll_back().aligned.name == "a"
    with pytest.raises(DataError, match="no version before this one"):
        twice.roll_back().roll_back()


def test_who_goes_back_while_there_is_a_canary_only_is_told_how_to_end_it() -> None:
    with pytest.raises(DataError, match="promote /runs/b --canary 0"):
        registry("a", "b", promoted=("a",), candidate=Candidate("b", 0.1)).roll_back()


def test_a_promoted_candidate_is_no_candidate_any_more() -> None:
    assert registry("a", candidate=Candidate("a", 0.1)).promote("a").candidate is None
    assert registry("a", "b", candidate=Candidate("b", 0.1)).promote("a").candidate == Candidate("b", 0.1)


def test_what_is_asked_for_most_is_served_first_then_what_a_rollback_needs_then_the_newest() -> None:
    state = registry("a", "b", "c", "d", "e", promoted=("b", "c"), candidate=Candidate("a", 0.5))
    assert [one.name for one in state.wanted] == ["c", "a", "b", "e", "d"]


@pytest.mark.parametrize(
    ("wanted", "slots", "held"),
    [
        (["a"], [None], ["a"]),
        (["b", "a"], ["a"], ["b"]),
        (["b", "a"], ["a", None], ["a", "b"]),
        (["c", "b", "a"], ["a", "b"], ["c", "b"]),
        (["b", "c"], ["b", "a"], ["b", "c"]),
        ([], ["a"], [None]),
    ],
)
def test_what_is_in_a_slot_stays_there_and_the_least_wanted_makes_room(
    wanted: list[str], slots: list[str | None], held: list[str | None]
) -> None:
    assert assign([whole(name) for name in wanted], slots) == held


def test_a_slot_that_names_still_lead_to_does_not_get_a_third_version() -> None:
    twice = registry("a", "b", "c", promoted=("a", "b", "c"))
    assert stages(twice.roll_back(), ["b", "c"]) == [["b", "c"], ["b", "a"]]
    assert stages(twice, ["a", "b"]) == [["c", "b"]], "what was two before makes room"
    assert stages(twice, ["b"]) == [["c"]], "a single slot is loaded in place"
    assert stages(twice, [None, None]) == [["c", None], ["c", "b"]]


def test_adapters_take_no_slot() -> None:
    adapter = Version("x", "/models/x", "abc", rank=8)
    assert assign([adapter, whole("a")], [None, None]) == ["a", None]


def test_what_is_written_is_read_again_and_every_decision_is_logged(tmp_path: Path) -> None:
    file = RegistryFile(str(tmp_path / "serving"))
    with pytest.raises(DataError, match="start serving"):
        file.read()
    state = registry("a", "b", promoted=("a",), candidate=Candidate("b", 0.25))
    file.write(state, "promoted", version="a")
    file.write(file.read(), "canary", version="b")
    stored = file.read()
    assert stored.serial == 2
    assert (stored.versions, stored.promoted, stored.candidate) == (state.versions, state.promoted, state.candidate)
    log = [json.loads(line) for line in (tmp_path / "serving/decisions.jsonl").read_text().splitlines()]
    assert [(one["event"], one["version"]) for one in log] == [("promoted", "a"), ("canary", "b")]


def test_the_revision_changes_with_any_weight(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        weights_digest(str(tmp_path))
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2)}, file)
    before = weights_digest(str(tmp_path))
    save_file({"w": torch.ones(2)}, file)
    assert weights_digest(str(tmp_path)) != before
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a.safetensors is damaged"):
        weights_digest(str(tmp_path))
