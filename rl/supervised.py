"""Supervised fine-tuning: the same engine, scoring and batching as the learner, with the answers given."""

import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cluster.connect import ActorResources, ClusterSettings, Role, log_to_file
from cluster.settings import Settings
from rl.batching import plan_microbatches
from rl.engine import OptimizerSettings, TrainEngine, prepare_worker
from rl.policy import PolicySettings, adapt, load_model, load_processor, resolve_model, save_checkpoint
from rl.render import prompt_token_ids
from rl.scoring import ScoredSequence, collate, token_logps

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rl.types import Prompt


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
    data: Literal["world"] = "world"
    """Where prompts and answers come from; `world` is the tiny world's biased training text."""
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
    base = load_model(source, config.policy.precision)
    engine = TrainEngine(adapt(base, config.policy), config.optimizer, config.policy.precision, config.steps)
    base.train()
    examples = _examples(config, processor)
    started = time.perf_counter()
    for step in range(config.steps):
        batch = list(itertools.islice(examples, config.batch_size))
        tokens = sum(len(sequence.token_ids) for sequence in batch)
        plan = plan_microbatches([len(sequence) for sequence in batch], ranks, config.optimizer.tokens_per_microbatch)
        total = 0.0

        def losses() -> Any:
            nonlocal total
            for indices in plan[rank]:
                weight = 1.0 if indices else 0.0
                collated = collate([batch[i] for i in indices or [0]], processor, run_vision=True)
                loss = -weight * token_logps(engine.module, collated, engine.device).sum() / tokens
                total += float(loss.detach())
                yield loss * ranks

        engine.step(losses())
        if rank == 0 and (step + 1) % config.log_every == 0:
            row = {"step": step + 1, "loss": round(total * ranks, 5), "lr": engine.learning_rate}
            row["seconds"] = round(time.perf_counter() - started, 1)
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
    weights = {name: tensor.detach().cpu().clone() for name, tensor in engine.full_weights(base.state_dict())}
    if rank == 0:
        save_checkpoint(base, weights, processor, output / "model")
    torch.distributed.barrier()


def _examples(config: SftConfig, processor: "ProcessorMixin") -> Any:
    from rl.world.training_text import training_examples

    for prompt, answer in training_examples(config.seed):
        yield to_sequence(prompt, answer, processor)


def to_sequence(prompt: "Prompt", answer: str, processor: "ProcessorMixin") -> ScoredSequence:
    """The prompt and its answer as tokens, the answer closed by the end-of-turn token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return ScoredSequence(prompt_token_ids(prompt, processor, expand_images=True), tuple(ids), prompt.images)
