"""The annotation job: real sampling, a paid judge played on loopback, stops, budgets and resumes."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import ROOT, Cluster, interrupt, raylign, read_until, start
from tests.judge_api import KEY, USAGE, JudgeApi, judge_api

PROMPTS = 40
EACH = (USAGE[0] * 1.0 + USAGE[1] * 10.0) / 1e6


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeApi]:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    with judge_api() as running:
        yield running


@pytest.fixture
def config(cluster: Cluster, api: JudgeApi, tmp_path: Path) -> Path:
    fields: dict[str, Any] = {
        "prompts_per_step": 8,
        "cluster": {"address": cluster.address},
        "policy": {"max_length": 128},
        "data": {"kind": "world", "prompts": PROMPTS},
        "rollout": {"sampling": {"completions": 4, "temperature": 1.5, "max_tokens": 24}},
        "judge": {
            "kind": "gemini", "base_url": api.url, "input_price": 1.0, "output_price": 10.0, "concurrency": 4,
            "cache": str(tmp_path / "cache.sqlite"),
        },
        "pairs": {"rule": "all_pairs"},
    }  # fmt: skip
    path = tmp_path / "annotate.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def quality(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quality.json").read_text())


def asked(api: JudgeApi) -> list[str]:
    return [json.dumps(request["body"], sort_keys=True) for request in api.requests]


def test_a_stopped_and_a_killed_run_go_on_without_paying_twice(config: Path, api: JudgeApi, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    api.delay = 0.3
    arguments = ["annotate", str(config), f"run.dir={folder}"]
    process = start(*arguments)
    read_until(process, "8/40")
    stopped = interrupt(process)
    assert stopped.code == 130, stopped.output
    assert "--resume" in stopped.output
    after_stop = len(api.requests)
    assert 8 <= after_stop < PROMPTS

    process = start(*arguments, "--resume")
    read_until(process, "24/40")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    api.delay = 0.0
    done = raylign(*arguments, "--resume")
    assert done.code == 0, done.output
    calls = asked(api)
    cut_off = len(calls) - len(set(calls))
    assert cut_off <= 4, "only calls that were under way when the process was killed are made again"
    result = quality(folder)
    assert result["prompts"] == PROMPTS
    assert result["completions"] == 4 * PROMPTS
    assert len(list((folder / "pairs").glob("*.parquet"))) == 5
    assert (folder / "report.html").is_file()
    assert KEY not in done.output + (folder / "config.yaml").read_text()


def test_a_spent_budget_stops_cleanly_and_a_larger_one_goes_on(config: Path, api: JudgeApi, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["annotate", str(config), f"run.dir={folder}"]
    spent = raylign(*arguments, f"judge.budget={12.5 * EACH}")
    assert spent.code == 7, spent.output
    assert "judge.budget" in spent.output
    assert "Traceback" not in spent.output
    assert len(api.requests) <= 12
    done = raylign(*arguments, "judge.budget=1", "--resume")
    assert done.code == 0, done.output
    assert quality(folder)["prompts"] == PROMPTS
    assert len(set(asked(api))) == len(api.requests) <= PROMPTS
    assert quality(folder)["judge"]["cost"] == pytest.approx(len(api.requests) * EACH), "before and after the stop"
    changed = raylign(*arguments, "rollout.sampling.completions=3", "--resume", limit=60)
    assert changed.code == 3
    assert "rollout.sampling.completions is 3, but the run in" in changed.output


def test_what_was_annotated_is_exported_and_learned_from(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """Export to TRL, then the pairs and answers as sources of offline DPO and of SteerLM."""
    folder = tmp_path / "run"
    oracle = ["judge={kind: oracle}", "data.prompts=60", "pairs.margin=1"]
    annotated = raylign("annotate", str(config), f"run.dir={folder}", *oracle)
    assert annotated.code == 0, annotated.output
    exported = raylign("export", str(folder), str(tmp_path / "set.parquet"))
    assert exported.code == 0, exported.output

    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), split="train")
    assert table.column_names == ["prompt", "chosen", "rejected", "images"]
    assert len(table) == quality(folder)["pairs"] > 0
    assert "exists" in raylign("export", str(folder), str(tmp_path / "set.parquet")).output

    aligned = raylign(
        "align", "jobs/configs/demo.yaml", f"run.dir={tmp_path / 'dpo'}", f"cluster.address={cluster.address}",
        f"pairs={{kind: offline, path: {folder}, flipped: 0.25}}", "loop.steps=2", "loop.prompts_per_step=8",
        "data.heldout_scenes=8", "data.prompts=20",
    )  # fmt: skip
    assert aligned.code == 0, aligned.output
    rows = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["pairs"] for row in rows] == [8, 8]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-3)

    itself = raylign(
        "annotate", str(config), f"run.dir={tmp_path / 'itself'}", f"policy.model={tmp_path / 'dpo' / 'model'}",
        "reference.model=rl/world/base", "judge={kind: implicit}", "pairs.margin=1e-5",
    )  # fmt: skip
    assert itself.code == 0, itself.output
    assert quality(tmp_path / "itself")["pairs"] > 0, "two updates have made a difference"

    trained = raylign(
        "sft", str(ROOT / "jobs/configs/world-sft.yaml"), "output=steered", "data={kind: steerlm, path: run}",
        "steps=2", "batch_size=8", "log_every=1", f"cluster.address={cluster.address}", cwd=tmp_path,
    )  # fmt: skip
    assert trained.code == 0, trained.output
    assert (tmp_path / "steered" / "model" / "model.safetensors").is_file()


def test_bad_rows_are_listed(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "copy: b c"}, {"prompt": ""}, {"prompt": "sort: c b", "images": ["no.png"]}, {"prompt": "2"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"data={{kind: files, train: {tmp_path / 'p.jsonl'}, heldout_share: 0}}"
    refused = raylign("annotate", str(config), f"run.dir={tmp_path / 'run'}", source)
    assert refused.code == 4
    assert "2 bad rows: p.jsonl row 2" in refused.output
    listed = (tmp_path / "run" / "bad-rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == [2, 3]
