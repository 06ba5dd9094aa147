"""Supervised training through the real engine."""

import json
from pathlib import Path

from tests.e2e.conftest import Cluster, raylign


def test_sft_lowers_the_loss_and_leaves_a_model_that_can_be_measured(cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks of ZeRO-3, from the shipped base, adapters left out."""
    output = tmp_path / "sft"
    outcome = raylign(
        "sft", "jobs/configs/world-base.yaml", f"output={output}", "steps=6", "batch_size=16", "from_scratch=true",
        "workers=2", "resources.threads=1", "resources.cpus=0.5", "optimizer.zero_stage=3", "optimizer.warmup_steps=2",
        "log_every=1", f"cluster.address={cluster.address}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.output
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    again = raylign("sft", "jobs/configs/world-base.yaml", f"output={output}")
    assert again.code == 4
    assert "is not empty" in again.output
    measured = raylign("evaluate", str(output / "model"), "--scenes=5")
    assert measured.code == 0, measured.output
    metrics = json.loads(measured.output[measured.output.index("{") :])
    assert metrics["language_accuracy"] < 0.5, "six steps teach nothing yet"
