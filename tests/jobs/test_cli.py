"""The command line: light, and with an exit code for each kind of error."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ClusterError, ConfigError, DataError, RaylignError, WeightSyncError, describe, root_cause
from jobs.align import plan
from jobs.cli import JOBS, main, run
from rl.config import AlignConfig


@pytest.mark.parametrize("arguments", [["--help"], *([job, "--help"] for job in JOBS)], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom jobs.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: raylign" in done.stdout


def test_usage_errors_end_with_two() -> None:
    for arguments in ([], ["nonsense"], ["align"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


def test_each_kind_of_error_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in (RaylignError, ConfigError, DataError, ClusterError, WeightSyncError)]
    assert len(set(codes)) == len(codes)


def test_an_error_is_printed_as_its_sentence_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def job(_: object) -> int:
        raise DataError("row 3: the image is broken")

    assert run(job, []) == DataError.exit_code
    assert capsys.readouterr().err == "error: row 3: the image is broken\n"


def test_what_ray_wraps_is_told_by_its_own_words() -> None:
    """Of an error in an actor's constructor Ray passes on nothing but a coloured trace."""
    from ray.exceptions import ActorDiedError, RayTaskError

    def wrapped(cause: Exception) -> Exception:
        trace = f"\x1b[36mray::Worker.__init__()\x1b[39m (pid=1)\n  File x, line 3\n{type(cause).__module__}."
        return RayTaskError("f", trace + f"{type(cause).__name__}: {cause}", cause).as_instanceof_cause()

    died = ActorDiedError()
    died.error_msg = "The actor died\n\x1b[36mray::W()\x1b[39m\n  File x\ncluster.errors.DataError: row 3: no image"
    assert isinstance(root_cause(died), DataError)
    assert str(root_cause(died)) == "row 3: no image"
    assert describe(wrapped(ValueError("two\nlines"))) == "ValueError: two"
    assert isinstance(root_cause(wrapped(ConfigError("field"))), ConfigError)
    died.error_msg = "The actor died\n\x1b[36mray::W()\x1b[39m\n  File x\nOSError: no such model"
    assert describe(died) == "ActorDiedError: OSError: no such model"


def test_dry_run_names_config_actors_and_outputs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["align", "jobs/configs/demo.yaml", "--dry-run", f"run.dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    for part in ("learning_rate:", "1 x rollout worker", "2 x learner worker", "report.html", str(tmp_path / "run")):
        assert part in printed
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_kind_of_model_is_written() -> None:
    from rl.policy import LoraSettings, PolicySettings

    assert "Hugging Face model folder" in plan(AlignConfig())
    assert "PEFT adapter" in plan(AlignConfig(policy=PolicySettings(lora=LoraSettings())))


def test_a_missing_model_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["align", "jobs/configs/demo.yaml", "policy.model=./no/such/model", f"run.dir={tmp_path / 'run'}"])
    assert code == DataError.exit_code
    assert "policy.model: folder ./no/such/model does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_doctor_reports_and_never_shows_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "sesame-open")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = main(["doctor"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for part in (
        "python",
        "versions",
        "memory",
        "gpus",
        "vllm",
        "deepspeed",
        "storage",
        "RAY_AUTH_MODE",
        "GEMINI_API_KEY set",
    ):
        assert part in printed
    assert "sesame" not in printed


def test_doctor_fails_for_an_unreachable_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", "127.0.0.1:1"]) == ClusterError.exit_code
    assert "nothing answers at 127.0.0.1:1" in capsys.readouterr().out
