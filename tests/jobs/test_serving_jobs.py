"""What serve, promote, rollback and keys do to the registry, without a server; and what a server tells them."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import yaml

from cluster.errors import ClusterError, DataError
from jobs import keys, promote, rollback, serve
from jobs.serve import announce, register
from rl.config import AlignConfig
from rl.policy import resolve_model
from serve.versions import RegistryFile, Said

BASE = Path(resolve_model("rl/world/base"))


def make_run(folder: Path, salt: bytes = b"", base: str = "rl/world/base", evaluated: float = 5.0) -> Path:
    """A finished run whose model is the base with other weights, if `salt` says so."""
    import torch
    from safetensors.torch import load_file, save_file

    (folder / "model").mkdir(parents=True)
    weights = load_file(BASE / "model.safetensors")
    first = sorted(weights)[0]
    weights[first] = weights[first] + torch.tensor(float(sum(salt)))
    save_file(weights, folder / "model/model.safetensors")
    config = AlignConfig().model_dump(mode="json")
    config["policy"]["model"] = base
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"policy_version": 7}))
    (folder / "evaluations").mkdir()
    rows = [
        {
            "prompt_id": f"p{i}",
            "answer": f"{salt!r}",
            "judgement": {"score": evaluated, "judge": "o", "prompt_hash": ""},
        }
        for i in range(60)
    ]
    told = {"version": 7, "metrics": {"judge_score": evaluated}, "answers": rows}
    (folder / "evaluations/version-00007.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def served(tmp_path: Path) -> RegistryFile:
    """A registry whose `aligned` is the run `one`."""
    file = RegistryFile(str(tmp_path / "serving"))
    registry, version = register(None, str(make_run(tmp_path / "one", b"1")))
    file.write(registry.promote(version.name), "registered")
    return file


def test_a_run_becomes_a_version_named_after_it_and_its_weights(tmp_path: Path) -> None:
    registry, version = register(None, str(make_run(tmp_path / "größte übung", b"1")))
    assert version.name == f"gr-te-bung-{version.revision[:6]}"
    assert (version.step, version.rank, registry.base.folder) == (7, 0, str(BASE))
    again, same = register(registry, str(tmp_path / "größte übung"))
    assert (again, same) == (registry, version)
    other, changed = register(registry, str(make_run(tmp_path / "again" / "größte übung", b"2")))
    assert changed.name != version.name
    assert set(other.versions) == {version.name, changed.name}


def test_what_is_no_finished_run_of_the_same_base_is_refused(tmp_path: Path, served: RegistryFile) -> None:
    with pytest.raises(DataError, match="is no run folder"):
        register(None, str(tmp_path))
    unfinished = make_run(tmp_path / "unfinished")
    shutil.rmtree(unfinished / "model")
    with pytest.raises(DataError, match="has no model yet"):
        register(None, str(unfinished))
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    shutil.copy(tmp_path / "one/model/model.safetensors", base / "model.safetensors")
    elsewhere = make_run(tmp_path / "elsewhere", b"3", base=str(base))
    with pytest.raises(DataError, match=r"which has other weights; serve it from a folder of its own"):
        register(served.read(), str(elsewhere))


def test_a_better_run_is_promoted_a_worse_one_is_not_unless_it_must_be(
    tmp_path: Path, served: RegistryFile, capsys: pytest.CaptureFixture[str]
) -> None:
    better, worse = make_run(tmp_path / "two", b"2", evaluated=9), make_run(tmp_path / "three", b"3", evaluated=1)
    where = f"dir={served.folder}"
    assert promote.main([str(better), where]) == 0
    assert served.read().aligned.name.startswith("two-")
    before = served.read()
    refusal = r"three-\w+ is not promoted: against two-\w+, win rate is 0, but gate.win_rate asks for 0.5"
    with pytest.raises(DataError, match=refusal):
        promote.main([str(worse), where])
    assert served.read() == before, "a server is not told of a refusal"
    capsys.readouterr()
    assert promote.main([str(worse), where, "--force"]) == 0
    assert re.match(r"gate not passed: .* against two-\w+; --force overrides it\n", capsys.readouterr().out)
    assert served.read().aligned.name.startswith("three-")
    assert rollback.main([where]) == 0
    assert served.read().aligned.name.startswith("two-")
    log = [json.loads(line) for line in (served.folder / "decisions.jsonl").read_text().splitlines()]
    assert [one["event"] for one in log] == ["registered", "promoted", "refused", "promoted", "rolled back"]
    assert [one["passed"] for one in log[1:4]] == [True, False, False]
    assert log[1]["against"].startswith("one-")


def test_a_candidate_comes_and_goes_without_changing_what_is_aligned(tmp_path: Path, served: RegistryFile) -> None:
    better, where = make_run(tmp_path / "two", b"2", evaluated=9), f"dir={served.folder}"
    assert promote.main([str(better), where, "--canary", "0.25"]) == 0
    candidate = served.read().candidate
    assert candidate is not None
    assert (candidate.version.startswith("two-"), candidate.share) == (True, 0.25)
    assert served.read().aligned.name.startswith("one-")
    assert promote.main([str(better), where, "--canary", "0"]) == 0
    assert served.read().candidate is None


def test_what_a_server_cannot_load_is_taken_back(tmp_path: Path, served: RegistryFile) -> None:
    before = served.read()
    changed, version = register(before, str(make_run(tmp_path / "two", b"2")))
    served.write(changed.promote(version.name), "promoted")
    with served.served():
        served.say(Said(before.serial, ""))
        threading.Timer(0.1, served.say, [Said(before.serial + 1, "no room")]).start()
        with pytest.raises(ClusterError, match="nothing was changed: no room"):
            announce(served, before)
    assert served.read().aligned == before.aligned


def test_a_server_is_waited_for_even_while_it_starts_and_one_that_is_gone_is_not(
    served: RegistryFile, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(served.read().serial, "")
    served.say(said)  # by a server that was killed
    assert announce(served, served.read()) == 0
    assert "no server is running" in capsys.readouterr().out
    with served.served():
        threading.Timer(0.1, served.say, [said]).start()
        assert announce(served, served.read()) == 0
    assert re.search("still starting.*\n.*the server serves it", capsys.readouterr().out)
    assert announce(served, served.read()) == 0
    assert "no server is running" in capsys.readouterr().out


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, where = make_run(tmp_path / "one"), f"dir={tmp_path / 'typo'}"
    for command, arguments in (
        (promote.main, [str(run)]),
        (rollback.main, []),
        (serve.main, []),
        (serve.main, [str(tmp_path / "none")]),
        (keys.main, ["revoke", "anna"]),
    ):
        with pytest.raises(DataError):
            command([*arguments, where])
    assert keys.main(["list", where]) == 0
    assert "there are no keys; `raylign keys add NAME` makes one" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
