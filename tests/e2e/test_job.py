"""`ray job submit` against a real job server."""

import subprocess
from pathlib import Path

from tests.e2e.conftest import BIN, ROOT, Cluster, environment, listeners, summary


def test_a_submitted_job_aligns_and_leaves_its_run_under_home(
    cluster: Cluster, small_config: Path, tmp_path: Path
) -> None:
    """The command of the README; HOME is a fresh folder, as a relative run.dir in a job lies under it."""
    overrides = [
        "loop.steps=2", "loop.prompts_per_step=16", "data.prompts=120", "data.heldout_scenes=12",
        "rollout.sampling.completions=4", "run.dir=runs/submitted",
    ]  # fmt: skip
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
    command += ["--", "env", f"HOME={tmp_path}", "python", "-m", "jobs.align", "jobs/configs/demo.yaml", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout
    assert "2/2" in done.stdout, "the progress lines are in the job's log"
    assert "succeeded" in done.stdout
    result = summary(tmp_path / "raylign" / "runs" / "submitted")
    assert result["policy_version"] == 2
    assert result["probe_max_abs_diff"] <= 1e-4


def test_the_dashboard_listens_on_loopback_only(cluster: Cluster) -> None:
    assert listeners(int(cluster.dashboard.rpartition(":")[2])) == {"0100007F"}
