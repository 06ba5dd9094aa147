"""The loop: sample from the current policy, judge, pair, score under the reference, hand to the learner.

The learning half (rl/learner.py) takes each step's pairs, updates the policy and publishes it back. `max_lag`
bounds how far the sampling half may run ahead.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import log_to_file
from cluster.errors import DataError, JudgeError, RaylignError
from cluster.memory import PeakMemory
from rl.config import AlignConfig
from rl.data import ShuffledStream, check_prompts
from rl.evaluation import Answer, BaseAnswer, measure
from rl.formats import Fault
from rl.journal import Journal
from rl.judges import Judge, JudgeContext
from rl.pairs import PairSettings, UncertainPairs, check_references, make_pairs
from rl.policy import load_processor
from rl.queue import BatchQueue
from rl.reference import start_reference
from rl.rollout import Rollouts, SamplingSettings, start_rollouts
from rl.scoring import to_sequence
from rl.store import RunFolder
from rl.stored import OfflinePairs
from rl.tables import Answers
from rl.types import Pair, PairBatch
from rl.weights import Probe

if TYPE_CHECKING:
    from pydantic import SecretStr
    from ray.actor import ActorHandle

START_TIMEOUT_S = 900.0
MAX_EMPTY_ROUNDS = 20


class NoPairs(DataError):
    """The judge finds no difference any more between the policy's completions."""


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
        uncertain = config.pairs.uncertain if isinstance(config.pairs, PairSettings) else None
        self.uncertain = UncertainPairs(uncertain) if uncertain else None
        self.keys = keys
        self.first_step = first_step
        self.stopping = False
        self.refusal: RaylignError | None = None
        self._broken: BaseException | None = None
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
            except (JudgeError, NoPairs) as error:
                self.store.write_spent(self.judge.spent)
                if step == 1:
                    raise
                self.journal.warn(str(error))  # the learner finishes what there is
                self.refusal = error
                break
            self.reference.remember(batch.pairs)
            self.stream.position = batch.position
            await self.queue.put(batch)
        await self.queue.close()

    async def make_batch(self, step: int) -> PairBatch:
        """The pairs of a step, from where the config says, scored under the reference and stored."""
        settings = self.config.pairs
        if isinstance(settings, PairSettings):
            batch = await self.sample_pairs(step, settings)
        else:
            batch = await self.take_pairs(step)
        self.store.write_batch(batch)
        return batch

    async def take_pairs(self, step: int) -> PairBatch:
        """Offline: stored pairs, in an order that the seed settles."""
        timer = PhaseTimer()
        async with timer.phase("reference"):
            pairs = await self.reference.score(self.stream.take(self.config.loop.prompts_per_step))
        return PairBatch(step, tuple(pairs), self.stream.position, {"pairs": len(pairs)}, timer.seconds)

    async def sample_pairs(self, step: int, settings: PairSettings) -> PairBatch:
        """Online, the algorithm, one step of it: prompts, rollouts, judge, pairs, reference."""
        pairs: list[Pair] = []
        counts: Counter[str] = Counter()
        timer = PhaseTimer()
        self.journal.note("startup", first_rollout=self.journal.age)
        for attempt in range(MAX_EMPTY_ROUNDS):
            prompts = self.stream.take(self.config.loop.prompts_per_step)
            async with self._engines, timer.phase("sampling"):
                completions = await self.rollouts.generate(
                    prompts, self.config.rollout.sampling, self._seed(step, attempt)
                )
            if settings.rule == "best_vs_reference":
                answers = [Answers(prompt, tuple(group)) for prompt, group in zip(prompts, completions, strict=True)]
                completions = [list(one.with_reference(self.processor).completions) for one in answers]
            async with timer.phase("judging"):
                judgements = await self.judge.grade(prompts, completions)
            made, tally = make_pairs(prompts, completions, judgements, settings)
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
            told = ", ".join(f"{counts[name]} {name}" for name in ("ties", "identical", "abstentions", "unjudged"))
            raise NoPairs(
                f"step {step}: {counts['prompts']} prompts in a row made no pair ({told}); lower pairs.margin, "
                f"raise rollout.sampling.completions or temperature, or check the judge"
            )
        if self.uncertain:
            pairs = self.uncertain.mark(pairs)
        self.store.write_spent(self.judge.spent)
        return PairBatch(step, tuple(pairs), self.stream.position, dict(counts), timer.seconds, self.judge.spent)

    # What the driver calls.

    async def start(self) -> tuple[list["ActorHandle"], list[Probe]]:
        """Start the actors one after another and load the prompts; returns the rollout workers and a probe batch.

        The learner starts after this: on few cores, loading side by side takes far longer than in turn.
        """
        config = self.config
        before = self.store.read_batch(self.first_step - 1) if self.first_step > 1 else None
        rollout, reference = config.rollout, config.reference
        rollout_workers = start_rollouts(rollout, config.policy, self.model, config.weights.transfer, self.logs)
        self.processor = await asyncio.to_thread(load_processor, self.model)
        training, self.heldout = await asyncio.to_thread(config.data.load, config.seed, self.report)
        if not self.heldout:
            raise DataError("data: no prompt is held out to measure the policy on; set data.heldout_share above 0")
        room = config.policy.max_length - max(rollout.sampling.max_tokens, config.loop.eval_max_tokens)
        await asyncio.to_thread(check_prompts, [*training, *self.heldout], self.processor, room, rollout.max_images)
        config.judge.check([*training, *self.heldout])
        if isinstance(config.pairs, PairSettings):
            check_references(training, config.pairs)
        items: Sequence[Any] = training
        if isinstance(config.pairs, OfflinePairs):
            items = await asyncio.to_thread(
                config.pairs.load, config.seed, self.processor, config.policy.max_length, self.heldout, self.report
            )
        self.stream: ShuffledStream[Any] = ShuffledStream(items, config.seed, before.position if before else 0)
        self.journal.note("startup", prompts=self.journal.age)
        self.rollouts = Rollouts(rollout_workers)
        probed = training[: config.weights.probes]
        greedy = SamplingSettings(completions=1, temperature=0, max_tokens=rollout.sampling.max_tokens)
        answers = await asyncio.wait_for(self.rollouts.generate(probed, greedy, 0), START_TIMEOUT_S)
        probes = [Probe(prompt, to_sequence(prompt, answer)) for prompt, (answer,) in zip(probed, answers, strict=True)]
        self.journal.note("startup", rollout_workers=self.journal.age)
        self.reference = start_reference(reference, config.policy, self.model, self.logs)
        context = JudgeContext(self.logs, self.keys, self.reference.logps)
        self.judge: Judge = config.judge.build(context)
        self.judge.restore(self.store.read_spent())
        if self.uncertain:
            for step in range(max(1, self.first_step - self.uncertain.window), self.first_step):
                self.uncertain.observe(earlier.pairs if (earlier := self.store.read_batch(step)) else ())
        if self.first_step == 1:  # the engines hold version 0 as they loaded it; the first publication proves it
            self._welcoming = asyncio.create_task(self._welcome(0))
        return rollout_workers, probes

    def report(self, faults: Sequence[Fault]) -> None:
        """List rows that cannot be used in bad-rows.jsonl, and say so."""
        self.journal.warn(self.store.list_faults(faults))

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
        if self._broken is not None:
            raise self._broken
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
            sampled = [group[0] for group in await self.rollouts.generate(self.heldout, greedy, 0)]
        base = self.journal.base_answers() if version else {}
        groups = [[one] for one in sampled]
        if base and not self.judge.absolute:  # then the base's answers are judged again, beside the new ones
            groups = [[one, base[one.prompt_id].completion] for one in sampled]
        try:
            verdicts = await self.judge.grade(self.heldout, groups)
        except JudgeError as error:
            self.journal.warn(f"version {version} is not evaluated: {error}")
            return
        finally:
            self.store.write_spent(self.judge.spent)
        if version == 0 or not self.judge.absolute:
            base = {g[-1].prompt_id: BaseAnswer(g[-1], v[-1].score) for g, v in zip(groups, verdicts, strict=True)}
        answers = [
            Answer(prompt, one, verdict[0])
            for prompt, one, verdict in zip(self.heldout, sampled, verdicts, strict=True)
        ]
        metrics = measure(answers, base, self.judge.absolute)
        self.journal.evaluated(version, metrics, answers, time.perf_counter() - started)

    async def _welcome(self, version: int) -> None:
        """Evaluate a version that is due, then let sampling use it; what goes wrong is raised where that waits."""
        every = self.config.loop.eval_every
        try:
            if version // every > self.journal.last_evaluated // every:
                await self.evaluate(version)
        except BaseException as error:
            self._broken = error
        async with self._version:
            self._ready_version = version
            self._version.notify_all()

    async def _wait_for_version(self, version: int) -> None:
        """Wait until the engines hold `version` or a later one, and any evaluation then due is done."""
        async with self._version:
            await self._version.wait_for(lambda: self.stopping or self._ready_version >= version)
        if self._broken is not None:
            raise self._broken

    def _seed(self, step: int, attempt: int) -> int:
        return (self.config.seed * 1_000_003 + step) * MAX_EMPTY_ROUNDS + attempt


class PhaseTimer:
    """Seconds spent in each named phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
