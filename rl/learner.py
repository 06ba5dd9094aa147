"""The learning half: what every Ray Train worker runs."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import log_to_file
from rl.adapters import adapters_off
from rl.batching import plan_microbatches
from rl.config import AlignConfig
from rl.engine import StepResult, TrainEngine, prepare_worker
from rl.extras import sequences
from rl.pair_scoring import score_pairs, trust
from rl.policy import adapt, checkpoint_names, load_model, load_processor
from rl.reference import BASE_OF_ADAPTER
from rl.regimes import parts
from rl.scores import Scores
from rl.scoring import Batch, token_logps
from rl.store import RunFolder
from rl.types import MADE_BY_POLICY, Pair, PairBatch, PairValues
from rl.weights import Probe, Publisher, export_policy, merged_weights, weight_chunks

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef
    from ray.actor import ActorHandle

# Sampling, judging and evaluating one batch must fit; a judge far away may be slow.
BATCH_TIMEOUT_S = 3600.0
REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class LearnerTask:
    """What a worker needs to know."""

    config: AlignConfig
    model: str
    """The starting model, resolved."""
    folder: str
    """Address of the run folder."""
    logs: str
    """Local folder for this worker's log."""
    sampler: "ActorHandle"
    """The sampling half."""
    rollout_workers: "list[ActorHandle]"
    """The engines that get the weights."""
    probes: list[Probe]
    """What proves that they did."""


def learn(task: LearnerTask) -> None:
    """Take the pairs of each step, update, publish; until the sampling half has no more."""
    learner = Learner(task)
    learner.publish()
    while (batch := learner.next_batch()) is not None:
        learner.update(batch)
        if task.config.renews_reference(learner.version):
            learner.renew_reference()
        if learner.version % task.config.sync_every == 0:
            learner.publish()
        if learner.version % task.config.loop.checkpoint_every == 0:
            learner.checkpoint()
    learner.finish()


class Learner:
    """One rank of the learning half. Every rank calls every method, in the same order."""

    def __init__(self, task: LearnerTask):
        import ray.train

        context = ray.train.get_context()
        self._rank, self._ranks = context.get_world_rank(), context.get_world_size()
        log_to_file(Path(task.logs) / f"learner-{self._rank}.log")
        self.config = config = task.config
        prepare_worker(config.learner.resources.threads)
        import torch

        torch.manual_seed(config.seed)
        self._task = task
        self._optimizer = config.learner.optimizer
        self._reference = self._adapters_off_logps if config.reference == BASE_OF_ADAPTER else None
        self._processor = load_processor(task.model)
        self._model = adapt(load_model(task.model, config.policy.precision), config.policy)
        self.version = 0
        self._publisher: Publisher | None = None
        if task.rollout_workers:
            self._publisher = Publisher(
                config.weights,
                config.policy.lora,
                self._model,
                checkpoint_names(task.model),
                self._processor,
                task.rollout_workers,
                max(1, int(config.rollout.resources.gpus)),
                self._rank,
            )
        self._engine = TrainEngine(self._model, config.learner.optimizer, config.policy.precision, config.loop.steps)
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                self.version = self._engine.load(folder)["version"]
                self._restore_reference(Path(folder))
        self._published = -1
        self._saved = self.version
        if self._publisher:
            self._publisher.connect(self._engine)

    def next_batch(self) -> PairBatch | None:
        """The pairs of the next step, or None when there are none to come."""
        import ray

        self._waiting_since = time.perf_counter()
        batch: PairBatch | None = ray.get(self._task.sampler.batch.remote(self.version + 1), timeout=BATCH_TIMEOUT_S)
        return batch

    def update(self, batch: PairBatch) -> None:
        """One optimizer step on all pairs of the batch; makes the next policy version."""
        started = time.perf_counter()
        stale = [self._is_stale(pair) for pair in batch.pairs]
        drop = self.config.loop.stale == "drop"
        pairs = [pair for pair, old in zip(batch.pairs, stale, strict=True) if not (old and drop)]
        plan = plan_microbatches(list(map(_length, pairs)), self._ranks, self._optimizer.tokens_per_microbatch)
        sums = _Sums(self.config.loss.needs_reference)
        rate = self._engine.learning_rate
        result = StepResult(0.0, 0.0)
        if pairs:
            result = self._engine.step(self._losses(pairs, plan[self._rank], sums), len(plan[self._rank]))
        lags = Counter(self._lag(pair) for pair in batch.pairs)
        self.version += 1
        metrics: dict[str, Any] = sums.over_ranks(self._engine.device)
        if self._rank == 0:
            metrics |= {
                "grad_norm": result.grad_norm,
                "learning_rate": rate,
                "lag": sum(lags.elements()) / len(batch.pairs),
                "lag_max": max(lags),
                "lags": {str(lag): count for lag, count in sorted(lags.items())},
                "stale": sum(stale),
                "seconds_waiting": started - self._waiting_since,
                "seconds_update": time.perf_counter() - started,
            }
            self._tell("updated", self.version, metrics)

    def publish(self) -> None:
        """Give the weights to the engines, if there are any, while they rest; each proves that it holds them."""
        import ray

        if self._publisher is None:
            return
        started = time.perf_counter()
        if self._rank == 0:
            ray.get(self._task.sampler.pause.remote(), timeout=BATCH_TIMEOUT_S)
        paused = time.perf_counter()
        difference = self._publisher.publish(self.version, self._task.probes)
        if parts(self.config.pairs).needs_copy:
            chunks = self._weights()
            if self._rank == 0:
                ray.get(self._task.sampler.renew_copy.remote(chunks), timeout=BATCH_TIMEOUT_S)
        self._published = self.version
        if self._rank == 0:
            seconds = {"seconds_sync": time.perf_counter() - paused, "seconds_sync_wait": paused - started}
            self._tell("published", self.version, {"probe_max_abs_diff": difference} | seconds)

    def renew_reference(self) -> None:
        """Move the reference towards the policy, or make the policy the reference. A collective of all ranks."""
        import ray

        chunks = self._weights()
        if self._rank == 0:
            settings = self.config.reference_copy
            share = settings.share if settings and settings.update == "average" else 1.0
            ray.get(self._task.sampler.renew_reference.remote(self.version, chunks, share), timeout=BATCH_TIMEOUT_S)

    def _weights(self) -> "list[ObjectRef[Any]]":
        """The policy's weights in the object store, in chunks, on rank 0. A collective of all ranks."""
        import ray

        chunks = weight_chunks(merged_weights(self._model, self._engine), keep=self._rank == 0)
        return [ray.put(chunk) for chunk in chunks]

    def _save_reference(self, folder: Path) -> None:
        """Put the reference beside a checkpoint, if it changes."""
        import ray
        from safetensors.torch import save_file

        settings = self.config.reference_copy
        if self._rank == 0 and settings and settings.update != "fixed":
            version, weights = ray.get(self._task.sampler.reference_weights.remote(), timeout=BATCH_TIMEOUT_S)
            save_file(ray.get(weights, timeout=BATCH_TIMEOUT_S), folder / REFERENCE_FILE, {"version": version})

    def _restore_reference(self, folder: Path) -> None:
        import ray
        from safetensors import safe_open

        if self._rank == 0 and (folder / REFERENCE_FILE).is_file():
            with safe_open(folder / REFERENCE_FILE, "pt") as file:
                weights = ray.put({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                version = file.metadata()["version"]
            ray.get(self._task.sampler.restore_reference.remote(version, [weights]), timeout=BATCH_TIMEOUT_S)

    def checkpoint(self) -> None:
        """Store weights, optimizer and version through Ray Train."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state").mkdir()
            self._engine.save(folder, {"version": self.version})
            self._save_reference(Path(folder))
            ray.train.report({"version": self.version}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._saved = self.version

    def finish(self) -> None:
        """Publish and checkpoint what is not yet, and write the model."""
        if self._published != self.version:
            self.publish()
        if self._saved != self.version:
            self.checkpoint()
        with tempfile.TemporaryDirectory() as name:
            export_policy(self._model, self._engine, self._processor, Path(name) if self._rank == 0 else None)
            if self._rank == 0:
                RunFolder(self._task.folder).upload(Path(name), "model")

    def _lag(self, pair: Pair) -> int:
        """How many versions old a pair is; what the policy did not make has no age."""
        return self.version - pair.policy_version if pair.source in MADE_BY_POLICY else 0

    def _is_stale(self, pair: Pair) -> bool:
        return self._lag(pair) > self.config.loop.max_lag

    def _losses(self, pairs: Sequence[Pair], passes: list[list[int]], sums: "_Sums") -> Iterator["torch.Tensor"]:
        """One loss per forward pass, the pairs' losses averaged by weight over the whole batch. A pass in which this
        rank has no pair runs a pair for nothing."""
        import torch

        loss = self.config.loss
        total = sum(pair.weight for pair in pairs)
        for indices in passes:
            group = [pairs[index] for index in indices] or [pairs[0]]
            scores = score_pairs(
                group, self._engine.module, self._processor, self._engine.device, loss.needs, self._reference
            )
            weights = torch.tensor([pair.weight for pair in group], device=self._engine.device)
            losses = loss.loss(scores) * trust(group, scores, [self._is_stale(pair) for pair in group])
            if indices:
                sums.add(weights, losses, scores, loss.beta)
            yield (weights * losses).sum() * (self._ranks / total if indices else 0.0)

    def _adapters_off_logps(self, batch: Batch) -> "torch.Tensor":
        """Log-probs of a batch under the policy with its adapters off."""
        with adapters_off(self._model):
            return token_logps(self._engine.module, batch, self._engine.device)

    def _tell(self, what: str, version: int, metrics: dict[str, Any]) -> None:
        import ray

        ray.get(getattr(self._task.sampler, what).remote(version, metrics), timeout=BATCH_TIMEOUT_S)


class _Sums:
    """Sums of per-pair values on one rank, to be averaged by weight over all ranks' pairs."""

    NAMES = ("loss", "accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected")

    def __init__(self, with_reference: bool) -> None:
        self._values = dict.fromkeys((*self.NAMES, "divergence", "tokens", "weight"), 0.0)
        self._with_reference = with_reference

    def add(self, weights: "torch.Tensor", losses: "torch.Tensor", scores: Scores, beta: float) -> None:
        """Without a reference the policy's own log-probs stand in for the log-ratios."""
        policy = PairValues(*(side.detach() for side in scores.sums))
        ratios = PairValues(*(side.detach() for side in (scores.ratios if scores.reference else policy)))
        added = {
            "loss": losses.detach(),
            "accuracy": (ratios.chosen > ratios.rejected).float(),
            "reward_margin": beta * (ratios.chosen - ratios.rejected),
            "reward_chosen": beta * ratios.chosen,
            "reward_rejected": beta * ratios.rejected,
            "logps_chosen": policy.chosen,
            "logps_rejected": policy.rejected,
            "divergence": _k2(ratios.chosen) + _k2(ratios.rejected),
            "tokens": sum(scores.lengths),
            "weight": 1.0,
        }
        for name, value in added.items():
            self._values[name] += float((weights * value).sum())

    def over_ranks(self, device: "torch.device") -> dict[str, float]:
        """Means per pair over all ranks; `kl` estimates KL(policy || reference) in nats per token on the pairs'
        completions, which are samples of the policy, though not all of them."""
        import torch

        totals = torch.tensor(list(self._values.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(totals)
        values = dict(zip(self._values, totals.tolist(), strict=True))
        means = {name: values[name] / max(1e-9, values["weight"]) for name in self.NAMES}
        return means | ({"kl": values["divergence"] / max(1.0, values["tokens"])} if self._with_reference else {})


def _k2(log_ratio: "torch.Tensor") -> "torch.Tensor":
    """Half the squared log-ratio: never negative, and of low variance where KL is small (Schulman 2020). The
    unbiased estimators swing widely here, since half of what they see was picked for being bad."""
    return log_ratio**2 / 2


def _length(pair: Pair) -> int:
    """Tokens that a pair adds to a padded pass: its longest sequence, as often as it has any."""
    found = sequences(pair)
    return len(found) * max(map(len, found))
