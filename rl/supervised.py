"""Supervised fine-tuning: the same engine, scoring and batching as the learner, with the answers given."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cluster.connect import ActorResources, ClusterSettings, Role, log_to_file
from cluster.settings import Settings
from rl.answers import AnswerSettings, WorldText
from rl.batching import plan_microbatches
from rl.data import Report
from rl.engine import OptimizerSettings, TrainEngine, prepare_worker
from rl.formats import Fault
from rl.policy import PolicySettings, adapt, load_model, load_processor, resolve_model
from rl.render import written_completion
from rl.scoring import ScoredSequence, collate, to_sequence, token_logps
from rl.store import RunFolder
from rl.weights import export_policy

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin


class SftConfig(Settings):
    """Supervised training of a policy on given answers."""

    seed: int = 0
    """Of data order and initial weights."""
    output: str = "runs/sft"
    """Folder for the trained model and its logs, on a disk all workers share; must not exist or be empty."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(64, ge=1)
    """Examples in one optimizer step, over all workers."""
    data: AnswerSettings = WorldText()
    """Where prompts and answers come from."""
    from_scratch: bool = False
    """Start from an untrained LLaVA of the tiny world instead of `policy.model`."""
    log_every: int = Field(50, ge=1)
    """Steps between printed lines."""
    policy: PolicySettings = PolicySettings(freeze=())
    """The model to train."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-3, schedule="cosine", warmup_steps=50)
    """How to train it."""
    workers: int = Field(1, ge=1)
    """Ray Train workers."""
    resources: ActorResources = ActorResources(cpus=1, threads=2)
    """Of one worker."""
    cluster: ClusterSettings = ClusterSettings()
    """Which Ray cluster to use."""

    @property
    def roles(self) -> list[Role]:
        """The actors the job places."""
        return [Role("training worker", self.workers, self.resources)]


def supervise(config: SftConfig) -> None:
    """The function every Ray Train worker runs: train, then write the model to `config.output`."""
    import ray.train
    import torch

    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    output = Path(config.output)
    log_to_file(output / "logs" / f"sft-{rank}.log")
    prepare_worker(config.resources.threads)
    start_folder = output / "untrained"
    if config.from_scratch:
        from rl.world.checkpoint import write_untrained

        if rank == 0:
            write_untrained(start_folder, config.seed)
        torch.distributed.barrier()
    source = str(start_folder) if config.from_scratch else resolve_model(config.policy.model)
    processor = load_processor(source)
    model = adapt(load_model(source, config.policy.precision), config.policy)
    engine = TrainEngine(model, config.optimizer, config.policy.precision, config.steps)
    folder = RunFolder(config.output)

    def report(faults: Sequence[Fault]) -> None:
        if rank == 0:
            print(folder.list_faults(faults))

    examples = _examples(config, processor, report)
    started = time.perf_counter()
    for step in range(config.steps):
        batch = list(itertools.islice(examples, config.batch_size))
        tokens = sum(len(sequence.token_ids) for sequence in batch)
        plan = plan_microbatches([len(sequence) for sequence in batch], ranks, config.optimizer.tokens_per_microbatch)
        shares = [[batch[index] for index in indices] for indices in plan[rank]]
        result = engine.step(_losses(engine, processor, shares, batch[0], ranks / tokens), len(shares))
        if rank == 0 and (step + 1) % config.log_every == 0:
            row = {"step": step + 1, "loss": round(result.loss, 5), "lr": engine.learning_rate}
            row["seconds"] = round(time.perf_counter() - started, 1)
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    export_policy(model, engine, processor, output / "model" if rank == 0 else None)
    torch.distributed.barrier()


def _losses(
    engine: TrainEngine,
    processor: "ProcessorMixin",
    passes: list[list[ScoredSequence]],
    filler: ScoredSequence,
    scale: float,
) -> "Iterator[torch.Tensor]":
    """The negative log-likelihood of each pass, times `scale`. A pass without examples runs `filler` for nothing."""
    for examples in passes:
        batch = collate(examples or [filler], processor, run_vision=hasattr(processor, "image_processor"))
        logps = token_logps(engine.module, batch, engine.device)
        yield logps.sum() * (-scale if examples else 0.0)


def _examples(config: SftConfig, processor: "ProcessorMixin", report: Report) -> "Iterator[ScoredSequence]":
    for prompt, answer in config.data.examples(config.seed, report):
        yield to_sequence(prompt, written_completion(prompt, answer, processor))
