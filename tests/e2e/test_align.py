"""The main job, end to end, on real Ray, vLLM and DeepSpeed."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Cluster, interrupt, logs, pairs_of, raylign, read_until, rows, start, summary
from tests.judge_api import KEY, USAGE, judge_api

METRICS = ("chair_s", "chair_i", "object_recall", "pope_accuracy", "pope_f1", "language_accuracy", "judge_score")


def test_the_run_folder_holds_everything_that_is_documented(full_run: Path) -> None:
    result = summary(full_run)
    for moment in ("before", "after"):
        assert set(METRICS) | {"win_rate", "mean_length"} <= set(result[moment])
    assert result["policy_version"] == 3
    assert result["updates"] == 3
    assert result["publications"] == 4
    assert result["pairs"] > 0
    assert {"ties", "abstentions", "identical", "seed"} <= set(result)
    assert result["probe_max_abs_diff"] <= 1e-4
    assert result["peak_memory_bytes"] > 1 << 30
    assert {"sampling", "judging", "reference", "update", "sync", "evaluation", "total"} <= set(result["seconds"])
    assert {"ray", "torch", "deepspeed", "transformers"} <= set(result["versions"])
    for name in ("config.yaml", "report.html", "tensorboard", "checkpoints", "model/model.safetensors"):
        assert (full_run / name).exists(), name
    assert json.loads((full_run / "status.json").read_text()) == {"state": "finished"}


def test_every_step_has_a_row_and_a_line(full_run: Path) -> None:
    table = rows(full_run)
    assert [row["step"] for row in table] == [1, 2, 3]
    console = (full_run / "console.txt").read_text()
    for step in (1, 2, 3):
        assert f"{step}/3" in console
    assert "INFO" not in console, "engines must not talk over the progress table"


def test_recorded_lag_is_the_distance_of_versions_and_stays_within_the_bound(full_run: Path) -> None:
    from rl.store import RunFolder

    store = RunFolder(str(full_run))
    for row in rows(full_run):
        batch = store.read_batch(row["step"])
        assert batch is not None
        lags = [row["step"] - 1 - pair.policy_version for pair in batch.pairs]
        assert all(0 <= lag <= 1 for lag in lags)
        assert row["lag"] == pytest.approx(sum(lags) / len(lags))
        assert row["lag_max"] == max(lags)
    assert rows(full_run)[0]["lag"] == 0
    assert rows(full_run)[1]["lag"] == 1, "the second batch is sampled before there is a second version"


def test_pairs_load_as_a_preference_set_and_come_back_unchanged(full_run: Path) -> None:
    from datasets import load_dataset

    from rl.store import RunFolder

    batch = RunFolder(str(full_run)).read_batch(1)
    assert batch is not None
    table = load_dataset("parquet", data_files=str(full_run / "pairs/step-00001.parquet"), split="train")
    assert {"prompt", "chosen", "rejected", "images"} <= set(table.column_names)
    assert len(table) == len(batch.pairs)
    for row, pair in zip(table, batch.pairs, strict=True):
        assert row["chosen"][0]["content"][0]["text"] == pair.completions.chosen.text
        assert len(row["images"]) == len(pair.prompt.images)
        assert pair.reference_logps is not None
        assert pair.margin >= 2
        assert all(len(one.logps) == len(one.token_ids) for one in pair.completions)
        assert pair.completions.chosen.text != pair.completions.rejected.text


def test_the_first_update_starts_from_the_reference(full_run: Path) -> None:
    first = rows(full_run)[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-3)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert rows(full_run)[-1]["kl"] > 1e-6


def test_the_model_folder_loads_in_transformers_and_differs_from_the_base(full_run: Path) -> None:
    import torch

    from rl.policy import load_model, resolve_model

    base = load_model(resolve_model("rl/world/base"), "float32").state_dict()
    aligned = load_model(str(full_run / "model"), "float32").state_dict()
    assert set(aligned) == set(base)
    changed = {name for name in base if not torch.equal(base[name], aligned[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed), "the vision tower is frozen"


def test_the_report_needs_nothing_from_outside(full_run: Path) -> None:
    page = (full_run / "report.html").read_text()
    assert page.count("<svg") >= 10
    assert "data:image/png;base64," in page
    for outside in ('src="http', 'href="http', "@import", "<script src"):
        assert outside not in page


def test_a_full_folder_is_not_written_over_by_accident(full_run: Path, small_config: Path) -> None:
    before = (full_run / "summary.json").read_text()
    outcome = raylign("align", str(small_config), f"run.dir={full_run}")
    assert outcome.code == 4
    assert "is not empty" in outcome.output
    assert "--resume" in outcome.output
    assert (full_run / "summary.json").read_text() == before


def test_mixed_pairs_with_adapters_two_workers_and_accumulation(
    cluster: Cluster, small_config: Path, blind_set: Path, tmp_path: Path
) -> None:
    """Stored and sampled pairs, those that become too old left out; LoRA, its base as the reference, IPO, two engines,
    several passes per step, less memory."""
    outcome = raylign(
        "align",
        str(small_config),
        f"run.dir={tmp_path / 'run'}",
        f"cluster.address={cluster.address}",
        f"pairs={{kind: mixed, stored: {{path: {blind_set}}}, sampled: {{margin: 1}}}}",
        "loop.max_lag=0",
        "loop.steps=2",
        "loop.sync_every=2",
        "rollout.workers=2",
        "policy.lora={rank: 8, alpha: 16}",
        "policy.gradient_checkpointing=true",
        "reference=base-of-adapter",
        "loss.kind=ipo",
        "learner.optimizer.learning_rate=3e-3",
        "learner.optimizer.tokens_per_microbatch=300",
    )
    folder = tmp_path / "run"
    assert outcome.code == 0, outcome.output + logs(folder)
    sources = [[pair.source for pair in pairs_of(folder, step)] for step in (1, 2)]
    assert all(set(step) == {"offline", "online"} for step in sources)
    assert [row["lag_max"] for row in rows(folder)] == [0, 1]
    assert [row["stale"] for row in rows(folder)] == [0, sources[1].count("online")]
    assert rows(folder)[0]["kl"] == pytest.approx(0, abs=1e-9), "without its adapter the policy is where it started"
    assert rows(folder)[-1]["kl"] > 1e-7, "the adapter must have moved the policy"
    assert not list((folder / "logs").glob("reference-*"))
    assert summary(folder)["probe_max_abs_diff"] <= 1e-4
    assert (folder / "model/adapter_model.safetensors").is_file()
    assert not (folder / "model/model.safetensors").exists()
    merged = _merge(folder)
    assert merged


def _merge(folder: Path) -> bool:
    """Whether the adapter, merged into its base, changes it."""
    import torch

    from rl.policy import load_model, resolve_model, whole_model

    base = resolve_model("rl/world/base")
    merged = whole_model(str(folder / "model"), folder / "merged", "float32")
    before, after = load_model(base, "float32").state_dict(), load_model(merged, "float32").state_dict()
    return any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["rollout.resources.cpus=64"], 5, "asks for 64.75 CPU"),
        (["cluster.address=127.0.0.1:1"], 5, "nothing answers at 127.0.0.1:1"),
        (["data={kind: files, train: nothing.jsonl, heldout: nothing.jsonl}"], 4, "nothing.jsonl does not exist"),
        (["data={kind: files, train: tests/e2e/prompts.jsonl}"], 4, "has no `truth`, by which the oracle judges"),
    ],
)
def test_what_cannot_run_is_refused_and_the_folder_stays_usable(
    cluster: Cluster, small_config: Path, tmp_path: Path, overrides: list[str], code: int, says: str
) -> None:
    arguments = ["align", str(small_config), f"run.dir={tmp_path / 'run'}", f"cluster.address={cluster.address}"]
    for _ in range(2):
        outcome = raylign(*arguments, *overrides, limit=120)
        assert outcome.code == code, outcome.output
        assert says in outcome.output
        assert "Traceback" not in outcome.output


def test_a_judge_that_refuses_ends_the_run_with_what_was_learned(
    cluster: Cluster, small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget lasts for the base's 20 held-out prompts, and some steps of 16 or more."""
    folder = tmp_path / "run"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with judge_api() as api:
        api.good = "circle"
        judge = f"{{kind: openai, base_url: {api.url}/v1, model: m, api_key_env: OPENAI_API_KEY, input_price: 1.0}}"
        outcome = raylign(
            "align", str(small_config), f"run.dir={folder}", f"cluster.address={cluster.address}", f"judge={judge}",
            f"judge.budget={110.5 * USAGE[0] / 1e6}", "data.heldout_scenes=4", "pairs.margin=1",
            "loop.steps=20",
        )  # fmt: skip
    assert outcome.code == 7, outcome.output + logs(folder)
    assert "error: judge.budget" in outcome.output
    assert len(api.requests) <= 110
    assert 1 <= summary(folder)["policy_version"] < 20
    assert summary(folder)["before"]["judge_score"] > 0
    assert (folder / "report.html").is_file()
    assert (folder / "model/model.safetensors").is_file()
    assert KEY not in outcome.output + "".join(file.read_text() for file in folder.rglob("*.yaml"))


def test_a_judge_that_refuses_at_once_ends_the_run_at_once(
    cluster: Cluster, small_config: Path, tmp_path: Path
) -> None:
    """While the learner is still starting; nothing is left of the run that could not be replaced."""
    arguments = ["align", str(small_config), f"run.dir={tmp_path / 'run'}", f"cluster.address={cluster.address}"]
    outcome = raylign(*arguments, "judge={kind: rules, function: 'os:fsencode'}", "pairs.margin=1")
    assert outcome.code == 7, outcome.output
    assert "os:fsencode failed on prompt" in outcome.output
    assert json.loads((tmp_path / "run/status.json").read_text()) == {"state": "failed"}


def test_a_stopped_run_saves_and_resumes_where_it_was(small_config: Path, tmp_path: Path) -> None:
    """On a cluster that the run starts itself, which asks for a token; Ctrl-C reaches all its processes."""
    folder = tmp_path / "run"
    arguments = ("align", str(small_config), f"run.dir={folder}")
    process = start(*arguments, "loop.steps=40", joining=False)
    seen = read_until(process, "3/40")
    stopped = interrupt(process)
    assert stopped.code == 130, seen + stopped.output
    assert "--resume" in stopped.output
    reached = summary(folder)["policy_version"]
    assert 3 <= reached < 40
    assert json.loads((folder / "status.json").read_text()) == {"state": "stopped"}
    assert (folder / "model/model.safetensors").is_file()

    changed = raylign(*arguments, "loop.steps=50", "loop.prompts_per_step=8", "--resume", limit=60)
    assert changed.code == 3
    assert "loop.prompts_per_step is 8, but the run in" in changed.output
    done = raylign(*arguments, f"loop.steps={reached}", "--resume", limit=60)
    assert done.code == 0
    assert "nothing left to do" in done.output
    before = summary(folder)["seconds"]["total"]

    resumed = raylign(*arguments, f"loop.steps={reached + 2}", "--resume")
    assert resumed.code == 0, resumed.output + logs(folder)
    assert f"resuming after step {reached}" in resumed.output
    table = rows(folder)
    assert [row["step"] for row in table] == list(range(1, reached + 3))
    assert summary(folder)["policy_version"] == reached + 2
    assert summary(folder)["seconds"]["total"] > before
    assert summary(folder)["probe_max_abs_diff"] <= 1e-4
    ends = [
        json.loads((folder / f"pairs/step-{step:05d}.json").read_text())["position"] for step in range(1, reached + 3)
    ]
    counts = [
        json.loads((folder / f"pairs/step-{step:05d}.json").read_text())["counts"]["prompts"]
        for step in range(1, reached + 3)
    ]
    assert ends == [sum(counts[: index + 1]) for index in range(len(counts))], "no prompt is lost or used twice"
