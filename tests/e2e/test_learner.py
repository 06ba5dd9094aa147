"""Every loss through the real learner: two ranks of Ray Train under ZeRO-3, pairs with everything that losses want."""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.connect import ActorResources, ClusterSettings, connect
from rl.config import AlignConfig, LearnerSettings, LoopSettings
from rl.engine import OptimizerSettings
from rl.extras import sequences, with_extras
from rl.learner import Learner, LearnerTask
from rl.objective import LOSSES, LossSettings
from rl.pair_scoring import score_pairs
from rl.policy import PolicySettings, load_model, load_processor, resolve_model
from rl.reference import ReferenceSettings, ReferenceWorker
from rl.render import written_completion
from rl.types import ExtraRole, Judgement, Pair, PairBatch, PairValues
from rl.world.corruption import corrupted_answer
from rl.world.prompts import training_prompts
from tests.e2e.conftest import Cluster

BASE = resolve_model("rl/world/base")
SMOOTHED = {"cdpo", "robust"}
SETTINGS = [LossSettings(kind=kind, **({"label_smoothing": 0.1} if kind in SMOOTHED else {})) for kind in LOSSES] + [
    LossSettings(kind={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, weighting="wpo"),
    LossSettings(kind="sigmoid", divergence="jensen_shannon"),
]


class Feed:
    """Stands at the place of the sampling half, with one batch for every step. Used as a Ray actor."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = tuple(pairs)
        self.told: list[dict[str, Any]] = []

    def batch(self, step: int) -> PairBatch:
        return PairBatch(step, self.pairs, step)

    def updated(self, version: int, metrics: dict[str, Any]) -> None:
        self.told.append(metrics)

    def all(self) -> list[dict[str, Any]]:
        return self.told


def one_step_of_each(work: tuple[LearnerTask, list[LossSettings]]) -> None:
    task, losses = work
    learner = Learner(task)
    for loss in losses:
        learner.config = task.config.model_copy(update={"loss": loss})
        batch = learner.next_batch()
        assert batch is not None
        learner.update(batch)


@pytest.fixture(scope="module")
def ray_cluster(cluster: Cluster) -> Iterator[None]:
    import ray

    connect(ClusterSettings(address=cluster.address))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pairs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Six pairs with a reference that is not the policy, all extras, and labels, weights and lags of their own."""
    import ray

    processor = load_processor(BASE)
    rng = np.random.default_rng(0)
    made = []
    for index, prompt in enumerate(training_prompts(6, language_share=0.3, seed=3)):
        texts = (prompt.reference_answer or "", corrupted_answer(prompt, rng))
        sides = PairValues(*(written_completion(prompt, text, processor) for text in texts))
        verdicts = PairValues(*(Judgement(score, None, "there is no ring", "test", "") for score in (1.0, 0.0)))
        pair = Pair(prompt, sides, verdicts, 1.0, "offline", 0, label_noise=0.1 * (index % 2), weight=1.0 - 0.1 * index)
        made.append(pair)
    samples = {pair.prompt.id: [written_completion(pair.prompt, "nothing.", processor)] for pair in made}
    made = with_extras(made, typing.get_args(ExtraRole), samples, processor, max_length=128)
    log = str(tmp_path_factory.mktemp("log") / "reference.log")
    actor: Any = ray.remote(ReferenceWorker).options(num_cpus=0)
    worker = actor.remote(ReferenceSettings(), PolicySettings(max_length=128), BASE, log)
    head = {name: value for name, value in ray.get(worker.weights.remote(), timeout=300).items() if "lm_head" in name}
    ray.get(worker.renew.remote({name: 1.03 * value for name, value in head.items()}, 1.0), timeout=60)
    scores = ray.get([worker.score.remote(sequences(pair)) for pair in made], timeout=300)
    return [with_reference(pair, logps) for pair, logps in zip(made, scores, strict=True)]


def with_reference(pair: Pair, scores: list[tuple[float, ...]]) -> Pair:
    chosen, rejected, *of_extras = scores
    extras = [extra._replace(reference_logps=logps) for extra, logps in zip(pair.extras, of_extras, strict=True)]
    return dataclasses.replace(pair, reference_logps=PairValues(chosen, rejected), extras=tuple(extras))


def told(
    pairs: list[Pair], folder: Path, losses: list[LossSettings], workers: int, tokens: int
) -> list[dict[str, Any]]:
    """What the learner tells of each loss's step, at a learning rate that leaves the weights as good as they are."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    config = AlignConfig(
        loop=LoopSettings(steps=len(losses)),
        policy=PolicySettings(max_length=128),
        learner=LearnerSettings(
            resources=ActorResources(cpus=0.25, threads=1),
            optimizer=OptimizerSettings(learning_rate=1e-12, tokens_per_microbatch=tokens),
        ),
    )
    feed: Any = ray.remote(Feed).options(num_cpus=0).remote(pairs)
    TorchTrainer(
        one_step_of_each,
        train_loop_config=(LearnerTask(config, BASE, str(folder), str(folder), feed, [], []), losses),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.25}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="losses", storage_path=str(folder)),
    ).fit()
    answers: list[dict[str, Any]] = ray.get(feed.all.remote(), timeout=60)
    return answers


@pytest.fixture(scope="module")
def of_all(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(pairs, tmp_path_factory.mktemp("losses"), SETTINGS, workers=2, tokens=400)


@pytest.mark.parametrize(("workers", "tokens"), [(1, 200), (2, 150)])
def test_the_gradient_does_not_depend_on_ranks_or_passes(
    of_all: list[dict[str, Any]], pairs: list[Pair], tmp_path: Path, workers: int, tokens: int
) -> None:
    """One rank in many passes, and two in many unequal ones, get the same gradient as two ranks in few."""
    (metrics,) = told(pairs, tmp_path, [LossSettings()], workers, tokens)
    assert SETTINGS[0] == LossSettings()
    assert metrics["grad_norm"] == pytest.approx(of_all[0]["grad_norm"], rel=1e-3)
    assert metrics["loss"] == pytest.approx(of_all[0]["loss"], rel=1e-5)


def test_the_learner_minimises_what_each_loss_says(of_all: list[dict[str, Any]], pairs: list[Pair]) -> None:
    import torch

    model, processor, cpu = load_model(BASE, "float32"), load_processor(BASE), torch.device("cpu")
    weights = torch.tensor([pair.weight for pair in pairs])
    assert len(of_all) == len(SETTINGS)
    for settings, metrics in zip(SETTINGS, of_all, strict=True):
        if settings.needs & {"mismatched"}:
            continue  # KTO's drift is taken over each pass
        with torch.no_grad():
            losses = settings.loss(score_pairs(pairs, model, processor, cpu, settings.needs))
        expected = float((weights * losses).sum() / weights.sum())
        assert metrics["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5), settings.kind


def test_every_loss_moves_the_policy(of_all: list[dict[str, Any]]) -> None:
    for settings, metrics in zip(SETTINGS, of_all, strict=True):
        assert 1e-6 < metrics["grad_norm"] < 1e4, settings.kind
        assert metrics["stale"] == 0


def test_kl_is_told_only_where_there_is_a_reference(of_all: list[dict[str, Any]]) -> None:
    for settings, metrics in zip(SETTINGS, of_all, strict=True):
        assert ("kl" in metrics) == settings.needs_reference
