"""The learning half: what every Ray Train worker runs."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import log_to_file
from rl.batching import plan_microbatches
from rl.config import AlignConfig
from rl.engine import TrainEngine, prepare_worker
from rl.policy import adapt, checkpoint_names, load_model, load_processor
from rl.scoring import collate, to_sequence, token_logps
from rl.store import RunFolder
from rl.types import Pair, PairBatch, PairValues
from rl.weights import Probe, Publisher, export_policy

if TYPE_CHECKING:
    import torch
    from ray.actor import ActorHandle

# Sampling, judging and evaluating one batch must fit; a judge far away may be slow.
BATCH_TIMEOUT_S = 3600.0


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
        if learner.version % task.config.loop.sync_every == 0:
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
        self._config = config = task.config
        prepare_worker(config.learner.resources.threads)
        import torch

        torch.manual_seed(config.seed)
        self._task = task
        self._processor = load_processor(task.model)
        self._model = adapt(load_model(task.model, config.policy.precision), config.policy)
        self._loss = config.loss.build()
        self.version = 0
        self._publisher = Publisher(
            config.weights,
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
        self._published = -1
        self._saved = self.version
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
        optimizer = self._config.learner.optimizer
        lengths = [_length(pair) for pair in batch.pairs]
        plan = plan_microbatches(lengths, self._ranks, optimizer.tokens_per_microbatch)
        sums = _Sums()
        rate = self._engine.learning_rate
        result = self._engine.step(self._losses(batch.pairs, plan[self._rank], sums), len(plan[self._rank]))
        self.version += 1
        metrics = sums.over_ranks(len(batch.pairs), self._engine.device)
        if self._rank == 0:
            lags = [self.version - 1 - pair.policy_version for pair in batch.pairs if pair.source == "online"] or [0]
            metrics |= {
                "grad_norm": result.grad_norm,
                "learning_rate": rate,
                "lag": sum(lags) / len(lags),
                "lag_max": max(lags),
            }
            metrics |= {
                "seconds_waiting": started - self._waiting_since,
                "seconds_update": time.perf_counter() - started,
            }
            self._tell("updated", self.version, metrics)

    def publish(self) -> None:
        """Give the weights to the engines while they rest, and have each prove that it holds them."""
        import ray

        started = time.perf_counter()
        if self._rank == 0:
            ray.get(self._task.sampler.pause.remote(), timeout=BATCH_TIMEOUT_S)
        paused = time.perf_counter()
        difference = self._publisher.publish(self.version, self._task.probes)
        self._published = self.version
        if self._rank == 0:
            seconds = {"seconds_sync": time.perf_counter() - paused, "seconds_sync_wait": paused - started}
            self._tell("published", self.version, {"probe_max_abs_diff": difference} | seconds)

    def checkpoint(self) -> None:
        """Store weights, optimizer and version through Ray Train."""
        import ray.train

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state").mkdir()
            self._engine.save(folder, {"version": self.version})
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

    def _losses(self, pairs: Sequence[Pair], passes: list[list[int]], sums: "_Sums") -> Iterator["torch.Tensor"]:
        """One loss per forward pass. A pass in which this rank has no pair runs a pair with weight zero."""
        import torch

        for indices in passes:
            group = [pairs[index] for index in indices] or [pairs[0]]
            policy = self._pair_logps(group)
            reference = _reference_logps(group, self._engine.device)
            noise = torch.tensor([pair.label_noise for pair in group], device=self._engine.device)
            losses = self._loss(policy, reference, noise)
            weight = 1.0 if indices else 0.0
            if indices:
                sums.add(group, losses, policy, reference, self._config.loss.beta)
            yield losses.sum() * (weight * self._ranks / len(pairs))

    def _pair_logps(self, pairs: Sequence[Pair]) -> "PairValues[torch.Tensor]":
        """Summed log-probs of chosen and rejected in one forward pass, each [pairs]."""
        sequences = [to_sequence(pair.prompt, pair.completions.chosen) for pair in pairs]
        sequences += [to_sequence(pair.prompt, pair.completions.rejected) for pair in pairs]
        batch = collate(sequences, self._processor, run_vision=hasattr(self._processor, "image_processor"))
        logps = token_logps(self._engine.module, batch, self._engine.device).sum(-1)
        return PairValues(logps[: len(pairs)], logps[len(pairs) :])

    def _tell(self, what: str, version: int, metrics: dict[str, Any]) -> None:
        import ray

        ray.get(getattr(self._task.sampler, what).remote(version, metrics), timeout=BATCH_TIMEOUT_S)


class _Sums:
    """Sums of per-pair values on one rank, to be averaged over all ranks' pairs."""

    NAMES = ("loss", "accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected")

    def __init__(self) -> None:
        self._values = dict.fromkeys((*self.NAMES, "divergence", "tokens"), 0.0)

    def add(
        self,
        pairs: Sequence[Pair],
        losses: "torch.Tensor",
        policy: "PairValues[torch.Tensor]",
        reference: "PairValues[torch.Tensor]",
        beta: float,
    ) -> None:
        ratios = PairValues(policy.chosen.detach() - reference.chosen, policy.rejected.detach() - reference.rejected)
        added = {
            "loss": losses.detach(),
            "accuracy": (ratios.chosen > ratios.rejected).float(),
            "reward_margin": beta * (ratios.chosen - ratios.rejected),
            "reward_chosen": beta * ratios.chosen,
            "reward_rejected": beta * ratios.rejected,
            "logps_chosen": policy.chosen.detach(),
            "logps_rejected": policy.rejected.detach(),
            "divergence": _k2(ratios.chosen) + _k2(ratios.rejected),
        }
        for name, value in added.items():
            self._values[name] += float(value.sum())
        self._values["tokens"] += sum(len(one.token_ids) for pair in pairs for one in pair.completions)

    def over_ranks(self, pairs: int, device: "torch.device") -> dict[str, float]:
        """Means per pair over all ranks; `kl` estimates KL(policy || reference) in nats per token on the pairs'
        completions, which are samples of the policy, though not all of them."""
        import torch

        totals = torch.tensor(list(self._values.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(totals)
        values = dict(zip(self._values, totals.tolist(), strict=True))
        means = {name: values[name] / pairs for name in self.NAMES}
        return means | {"kl": values["divergence"] / max(1.0, values["tokens"])}


def _k2(log_ratio: "torch.Tensor") -> "torch.Tensor":
    """Half the squared log-ratio: never negative, and of low variance where KL is small (Schulman 2020). The
    unbiased estimators swing widely here, since half of what they see was picked for being bad."""
    return log_ratio**2 / 2


def _length(pair: Pair) -> int:
    """Tokens that a pair adds to a padded pass: its longer side, twice."""
    return 2 * max(len(one.prompt_token_ids) + len(one.token_ids) for one in pair.completions)


def _reference_logps(pairs: Sequence[Pair], device: "torch.device") -> "PairValues[torch.Tensor]":
    import torch

    logps = [pair.reference_logps for pair in pairs]
    assert all(values is not None for values in logps)
    columns = torch.tensor([list(values or ()) for values in logps], device=device).unbind(1)
    return PairValues(*columns)
