"""Every kind of adapter in the real learning half, two ranks of DeepSpeed under Ray Train, with real engines."""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.connect import ActorResources, ClusterSettings, connect
from rl.adapters import AdapterKind
from rl.config import AlignConfig, LearnerSettings
from rl.engine import OptimizerSettings
from rl.learner import Learner, LearnerTask
from rl.policy import LoraSettings, PolicySettings, resolve_model
from rl.reference import ReferenceSettings, start_reference
from rl.rollout import RolloutSettings, SamplingSettings, start_rollouts
from rl.scoring import to_sequence
from rl.types import Completion, Judgement, Pair, PairBatch, PairValues, Prompt
from rl.weights import Probe
from rl.world.prompts import evaluation_prompts
from tests.e2e.conftest import Cluster

BASE = resolve_model("rl/world/base")
PROMPTS = evaluation_prompts(3, seed=0)
LIMIT_S = 300


@dataclass(frozen=True)
class Trial:
    """One learner to try."""

    kind: AdapterKind
    zero_stage: int = 3
    in_learner: bool = False
    """The reference is the policy with its adapter off."""
    recompute: bool = False
    """Gradient checkpointing."""
    restored: bool = False
    """The second update follows a restart from the checkpoint after the first."""

    def config(self) -> AlignConfig:
        lora = LoraSettings(kind=self.kind, rank=2, alpha=16)
        optimizer = OptimizerSettings(
            learning_rate=6e-3, zero_stage=self.zero_stage, tokens_per_microbatch=400, max_grad_norm=1e3
        )
        return AlignConfig(
            policy=PolicySettings(max_length=128, lora=lora, gradient_checkpointing=self.recompute),
            learner=LearnerSettings(optimizer=optimizer),
            reference="base-of-adapter" if self.in_learner else ReferenceSettings(),
        )


KINDS = [Trial("lora"), Trial("rslora", zero_stage=2), Trial("pissa"), Trial("dora", zero_stage=1)]
RESTORED = [replace(trial, restored=True) for trial in KINDS]
IN_LEARNER = [
    Trial("lora", in_learner=True),
    Trial("lora", in_learner=True, recompute=True),
    Trial("dora", in_learner=True, recompute=True),
]
TRIALS = [*KINDS, *RESTORED, *IN_LEARNER]


def label(trial: Trial) -> str:
    """For pytest's output."""
    options = [name for name in ("in_learner", "recompute", "restored") if getattr(trial, name)]
    return "-".join([trial.kind, f"zero{trial.zero_stage}", *options])


class Recorder:
    """Gives the learner the same batches each time, and keeps what it reports. Used as a Ray actor."""

    def __init__(self, batches: list[PairBatch]) -> None:
        self.batches = batches
        self.found: dict[str, Any] = {"probes": []}

    def batch(self, step: int) -> PairBatch:
        return self.batches[step - 1]

    def pause(self) -> None:
        """Nothing generates."""

    def published(self, version: int, metrics: dict[str, float]) -> None:
        self.found["probes"].append(metrics["probe_max_abs_diff"])

    def updated(self, version: int, metrics: dict[str, float]) -> None:
        self.found["kl"] = metrics["kl"]

    def take(self) -> dict[str, Any]:
        found, self.found = self.found, {"probes": []}
        return found


def try_all(loop: tuple[dict[Trial, LearnerTask], Path]) -> None:
    """What each Ray Train worker runs."""
    tasks, folder = loop
    for trial, task in tasks.items():
        try_one(trial, task, folder)


def try_one(trial: Trial, task: LearnerTask, folder: Path) -> None:
    """Two updates, published at either end, with a checkpoint between; what came out goes to a file."""
    import ray

    checkpoint = folder / f"{trial.kind}-{trial.zero_stage}"
    learner = Learner(task)
    if trial.restored:
        learner.version = learner._engine.load(str(checkpoint))["version"]
    else:
        learner.publish()
        update(learner)
    if trial in KINDS:
        learner._engine.save(str(checkpoint), {"version": learner.version})
        torch.distributed.barrier()
    update(learner)
    learner.publish()
    found = state(learner)
    if learner._rank == 0:
        found |= ray.get(task.sampler.take.remote())
        found["bytes"] = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        torch.save(found, folder / f"{TRIALS.index(trial)}.pt")


def update(learner: Learner) -> None:
    batch = learner.next_batch()
    assert batch is not None
    learner.update(batch)


def state(learner: Learner) -> dict[str, Any]:
    """The adapter's weights and the optimizer's running mean of their gradients, each in one vector."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    trained = [parameter for parameter in learner._model.parameters() if parameter.requires_grad]
    return {
        "weights": torch.cat([safe_get_full_fp32_param(one).flatten() for one in trained]),
        "gradients": torch.cat([safe_get_full_optimizer_state(one, "exp_avg").flatten() for one in trained]),
    }


@pytest.fixture(scope="module")
def found(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Trial, dict[str, Any]]]:
    """What every trial gave."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    connect(ClusterSettings(address=cluster.address))
    folder = tmp_path_factory.mktemp("adapters")
    try:
        engines = {kind: engine(kind, folder / kind) for kind in ("pissa", "dora")}
        sampled = sample(engines["pissa"], SamplingSettings(completions=2, temperature=1.5, max_tokens=48))
        probes = [Probe(prompt, to_sequence(prompt, group[0])) for prompt, group in sampled[:6]]
        recorder: Any = ray.remote(Recorder).options(num_cpus=0).remote(score(sampled, folder))
        tasks = {
            trial: LearnerTask(
                trial.config(), BASE, str(folder), str(folder), recorder,
                [engines["dora" if trial.kind == "dora" else "pissa"]], probes,
            )
            for trial in TRIALS
        }  # fmt: skip
        TorchTrainer(
            try_all,
            train_loop_config=(tasks, folder),
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.25}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(name="trials", storage_path=str(folder)),
        ).fit()
        yield {trial: torch.load(folder / f"{index}.pt") for index, trial in enumerate(TRIALS)}
    finally:
        ray.shutdown()


def engine(kind: AdapterKind, folder: Path) -> Any:
    """One that takes adapters up to the rank PiSSA's have, or one without."""
    settings = RolloutSettings(resources=ActorResources(cpus=1, threads=2))
    (worker,) = start_rollouts(settings, Trial(kind).config().policy, BASE, "object_store", folder)
    return worker


def sample(worker: Any, sampling: SamplingSettings) -> list[tuple[Prompt, list[Completion]]]:
    import ray

    return list(zip(PROMPTS, ray.get(worker.generate.remote(PROMPTS, sampling, 0, 0), timeout=LIMIT_S), strict=True))


def score(sampled: list[tuple[Prompt, list[Completion]]], folder: Path) -> list[PairBatch]:
    """Two batches of pairs, scored by a reference worker."""
    import ray

    verdict = Judgement(1.0, None, "", "test", "")
    pairs = [
        Pair(prompt, PairValues(chosen, rejected), PairValues(verdict, verdict), 1.0, "online", 0)
        for prompt, (chosen, rejected) in sampled
    ]
    reference = start_reference(ReferenceSettings(), PolicySettings(max_length=128), BASE, folder)
    scored = asyncio.run(reference.score(pairs))
    for worker in reference._workers:
        ray.kill(worker)
    half = len(scored) // 2
    return [PairBatch(1, tuple(scored[:half]), half), PairBatch(2, tuple(scored[half:]), len(scored))]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("trial", TRIALS, ids=label)
def test_the_engines_hold_the_adapted_policy(found: dict[Trial, dict[str, Any]], trial: Trial) -> None:
    assert len(found[trial]["probes"]) == (1 if trial.restored else 2)
    assert max(found[trial]["probes"]) <= 1e-4
    assert found[trial]["kl"] > 1e-5, "the policy must have moved, or this test shows nothing"


@pytest.mark.parametrize("trial", KINDS, ids=label)
def test_a_small_checkpoint_restores_adapter_and_optimizer_exactly(
    found: dict[Trial, dict[str, Any]], trial: Trial
) -> None:
    restored = found[replace(trial, restored=True)]
    assert torch.equal(restored["weights"], found[trial]["weights"])
    assert torch.equal(restored["gradients"], found[trial]["gradients"])
    assert found[trial]["bytes"] < Path(BASE, "model.safetensors").stat().st_size / 10


@pytest.mark.parametrize("trial", IN_LEARNER, ids=label)
def test_a_reference_by_disabling_gives_the_gradient_of_a_separate_copy(
    found: dict[Trial, dict[str, Any]], trial: Trial
) -> None:
    """For DoRA also: sharded weights give the gradient of whole ones."""
    separate = next(found[one] for one in KINDS if one.kind == trial.kind)
    assert distance(found[trial]["gradients"], separate["gradients"]) <= 1e-5
    assert found[trial]["kl"] == pytest.approx(separate["kl"], rel=1e-3)
