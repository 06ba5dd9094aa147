"""The loop: sample from the current policy, judge, pair, score under the reference, hand to the learner.

The learning half (rl/learner.py) takes each step's pairs, updates the policy and publishes it back. `max_lag`
bounds how far the sampling half may run ahead.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import log_to_file
from cluster.errors import DataError, JudgeError
from cluster.memory import PeakMemory
from rl.config import AlignConfig
from rl.data import PromptStream, check_prompts
from rl.evaluation import Answer, measure
from rl.journal import Journal
from rl.judges import Judge, JudgeContext
from rl.pairs import UncertainPairs, make_pairs
from rl.policy import load_processor
from rl.queue import BatchQueue
from rl.reference import Reference, ReferenceWorker, model_version
from rl.render import written_completion
from rl.rollout import Rollouts, RolloutWorker, SamplingSettings
from rl.scoring import to_sequence
from rl.store import RunFolder
from rl.types import Completion, Pair, PairBatch, Prompt
from rl.weights import Probe

if TYPE_CHECKING:
    from pydantic import SecretStr
    from ray.actor import ActorHandle

START_TIMEOUT_S = 900.0
MAX_EMPTY_ROUNDS = 20


class SamplingHalf:
    """Makes the pairs of every step. Used as an async Ray actor."""

    def __init__(
        self, config: AlignConfig, model: str, folder: str, logs: str, first_step: int, keys: "Mapping[str, SecretStr]"
    ):
        """`keys` are the judge's API keys by the name of their environment variable."""
        log_to_file(Path(logs) / "sampler.log")
        self.config = config
        self.model = model
        self.logs = Path(logs)
        self.store = RunFolder(folder)
        self.journal = Journal(self.store)
        self.memory = PeakMemory()
        self.queue = BatchQueue(capacity=config.loop.max_lag + 1, first_step=first_step)
        self.uncertain = UncertainPairs(config.pairs.uncertain) if config.pairs.uncertain else None
        self.keys = keys
        self.first_step = first_step
        self.stopping = False
        self.refusal: JudgeError | None = None
        self._version = asyncio.Condition()
        self._ready_version = -1
        self._engines = asyncio.Lock()

    async def run(self) -> None:
        """Make the pairs of every step until there are enough, or a stop is asked for."""
        loop = self.config.loop
        for step in range(self.first_step, loop.steps + 1):
            await self._wait_for_version(max(0, step - 1 - loop.max_lag))
            if self.stopping:
                break
            try:
                batch = self.store.read_batch(step) or await self.make_batch(step)
            except JudgeError as error:  # the learner finishes what there is
                self.journal.warn(str(error))
                self.refusal = error
                break
            self.reference.remember(batch.pairs)
            self.prompts.position = batch.prompts_end
            await self.queue.put(batch)
        await self.queue.close()

    async def make_batch(self, step: int) -> PairBatch:
        """The algorithm, one step of it: prompts, rollouts, judge, pairs, reference."""
        pairs: list[Pair] = []
        counts: Counter[str] = Counter()
        timer = PhaseTimer()
        self.journal.note("startup", first_rollout=self.journal.age)
        for attempt in range(MAX_EMPTY_ROUNDS):
            prompts = self.prompts.take(self.config.loop.prompts_per_step)
            async with self._engines, timer.phase("sampling"):
                completions = await self.rollouts.generate(
                    prompts, self.config.rollout.sampling, self._seed(step, attempt)
                )
            if self.config.pairs.rule == "best_vs_reference":
                completions = [
                    [*group, *_reference_answer(prompt, self.processor)]
                    for prompt, group in zip(prompts, completions, strict=True)
                ]
            async with timer.phase("judging"):
                judgements = await self.judge.grade(prompts, completions)
            made, tally = make_pairs(prompts, completions, judgements, self.config.pairs)
            async with timer.phase("reference"):
                pairs += await self.reference.score(made)
            sampled = [one for group in completions for one in group]
            counts.update(tally)
            counts.update(
                prompts=len(prompts), completions=len(sampled), tokens=sum(len(one.token_ids) for one in sampled)
            )
            if pairs:
                break
        else:
            raise DataError(
                f"step {step}: {counts['prompts']} prompts in a row made no pair ({dict(counts)}); lower pairs.margin, "
                f"raise rollout.sampling.completions or temperature, or check the judge"
            )
        if self.uncertain:
            pairs = self.uncertain.mark(pairs)
        judging = {**self.judge.tally, "cost": self.judge.cost}
        batch = PairBatch(step, tuple(pairs), self.prompts.position, dict(counts), timer.seconds, judging)
        self.store.write_batch(batch)
        return batch

    # What the driver calls.

    async def start(self) -> tuple[list["ActorHandle"], list[Probe]]:
        """Start the actors one after another and load the prompts; returns the rollout workers and a probe batch.

        The learner starts after this: on few cores, loading side by side takes far longer than in turn.
        """
        import ray

        config = self.config
        rollout, reference = config.rollout, config.reference
        rollout_workers = []
        for index in range(rollout.workers):
            actor = ray.remote(RolloutWorker).options(num_cpus=rollout.resources.cpus, num_gpus=rollout.resources.gpus)
            log = str(self.logs / f"rollout-{index}.log")
            worker = actor.remote(rollout, config.policy, self.model, config.weights.transfer, log)
            rollout_workers.append(worker)
        self.processor = await asyncio.to_thread(load_processor, self.model)
        training, self.heldout = await asyncio.to_thread(config.data.load, config.seed)
        room = config.policy.max_length - max(rollout.sampling.max_tokens, config.loop.eval_max_tokens)
        await asyncio.to_thread(check_prompts, [*training, *self.heldout], self.processor, room, rollout.max_images)
        self.prompts = PromptStream(training, config.seed, self._resume_position())
        self.journal.note("startup", prompts=self.journal.age)
        self.rollouts = Rollouts(rollout_workers)
        probed = training[: config.weights.probes]
        greedy = SamplingSettings(completions=1, temperature=0, max_tokens=rollout.sampling.max_tokens)
        answers = await asyncio.wait_for(self.rollouts.generate(probed, greedy, 0), START_TIMEOUT_S)
        probes = [Probe(prompt, to_sequence(prompt, answer)) for prompt, (answer,) in zip(probed, answers, strict=True)]
        self.journal.note("startup", rollout_workers=self.journal.age)
        reference_actor = ray.remote(ReferenceWorker).options(
            num_cpus=reference.resources.cpus, num_gpus=reference.resources.gpus
        )
        self.reference = Reference(
            [
                reference_actor.remote(reference, config.policy, self.model, str(self.logs / f"reference-{index}.log"))
                for index in range(reference.workers)
            ],
            model_version(self.model),
        )
        context = JudgeContext(self.logs, self.keys, self.reference.logps)
        self.judge: Judge = config.judge.build(context)
        if self.first_step == 1:  # the engines hold version 0 as they loaded it; the first publication proves it
            self._welcoming = asyncio.create_task(self._welcome(0))
        return rollout_workers, probes

    async def stop(self) -> None:
        """Make no more batches; the learner finishes with those that are made."""
        self.stopping = True
        async with self._version:
            self._version.notify_all()
        await self.queue.close()

    async def events(self, after: int) -> list[dict[str, Any]]:
        """What happened since event `after`; waits a moment if nothing has."""
        return await self.journal.wait(after)

    async def finish(self) -> dict[str, Any]:
        """Evaluate the last version if that was not done yet; returns what the summary is made of."""
        await self._welcoming
        if self.journal.last_evaluated != self.rollouts.version:
            await self.evaluate(self.rollouts.version)
        return {
            "version": self.rollouts.version,
            "startup": self.journal.startup,
            "peak_memory_bytes": self.memory.stop(),
            "refusal": self.refusal,
        }

    # What the learner calls.

    async def batch(self, step: int) -> PairBatch | None:
        """The pairs of a step; None if there are no more. Every rank asks, and gets the same."""
        return await self.queue.get(step)

    async def pause(self) -> None:
        """Returns when no engine is generating; none will until `published`."""
        await self._engines.acquire()

    async def published(self, version: int, metrics: dict[str, float]) -> None:
        """The engines hold `version`, proven by the probe; sampling goes on, after an evaluation if one is due."""
        is_new = version != self.rollouts.version or self._ready_version < 0
        self.rollouts.version = version
        self._engines.release()
        self.journal.published(version, metrics)
        if is_new:
            self._welcoming = asyncio.create_task(self._welcome(version))

    async def updated(self, version: int, metrics: dict[str, float]) -> None:
        """The learner made `version` from the batch of the same number."""
        batch = self.queue.last(version)
        self.journal.updated(version, metrics, batch)

    # Inside.

    async def evaluate(self, version: int) -> None:
        """Greedy answers to the held-out prompts, judged and measured against the base's."""
        started = time.perf_counter()
        greedy = SamplingSettings(completions=1, temperature=0, max_tokens=self.config.loop.eval_max_tokens)
        async with self._engines:
            groups = await self.rollouts.generate(self.heldout, greedy, 0)
        base = self.journal.base_answers()
        if not self.judge.absolute:  # then the base's answers must be judged again, beside the new ones
            groups = [
                [group[0], base[p.id][0] if base else group[0]] for p, group in zip(self.heldout, groups, strict=True)
            ]
        try:
            verdicts = await self.judge.grade(self.heldout, groups)
        except JudgeError as error:
            self.journal.warn(f"version {version} is not evaluated: {error}")
            return
        answers = [
            Answer(prompt, group[0], judged[0])
            for prompt, group, judged in zip(self.heldout, groups, verdicts, strict=True)
        ]
        base_scores = {
            prompt.id: base[prompt.id][1] if base and self.judge.absolute else judged[-1].score
            for prompt, judged in zip(self.heldout, verdicts, strict=True)
        }
        metrics = measure(answers, base_scores)
        self.journal.evaluated(version, metrics, answers, time.perf_counter() - started)

    async def _welcome(self, version: int) -> None:
        every = self.config.loop.eval_every
        if version // every > self.journal.last_evaluated // every:
            await self.evaluate(version)
        async with self._version:
            self._ready_version = version
            self._version.notify_all()

    async def _wait_for_version(self, version: int) -> None:
        """Wait until the engines hold `version` or a later one, and any evaluation then due is done."""
        async with self._version:
            await self._version.wait_for(lambda: self.stopping or self._ready_version >= version)

    def _seed(self, step: int, attempt: int) -> int:
        return (self.config.seed * 1_000_003 + step) * MAX_EMPTY_ROUNDS + attempt

    def _resume_position(self) -> int:
        before = self.store.read_batch(self.first_step - 1) if self.first_step > 1 else None
        return before.prompts_end if before else 0


def _reference_answer(prompt: Prompt, processor: Any) -> list[Completion]:
    return [written_completion(prompt, prompt.reference_answer, processor)] if prompt.reference_answer else []


class PhaseTimer:
    """Seconds spent in each named phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
