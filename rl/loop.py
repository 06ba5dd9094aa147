"""The loop: sample from the current policy, judge, pair, score under the reference, hand to the learner.

The learning half (rl/learner.py) takes each step's pairs, updates the policy and publishes it back. `max_lag`
bounds how far the sampling half may run ahead.
"""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import log_to_file
from cluster.errors import DataError, JudgeError, RaylignError
from cluster.memory import PeakMemory
from rl.config import AlignConfig
from rl.data import check_prompts
from rl.evaluation import Answer, BaseAnswer, measure
from rl.extras import with_extras
from rl.formats import Fault
from rl.journal import Journal
from rl.judges import Judge, JudgeContext
from rl.pairs import UncertainPairs
from rl.policy import load_processor
from rl.queue import BatchQueue
from rl.reference import Reference, start_reference
from rl.regimes import IterativePairs, Tools, equip, make_regime, parts
from rl.rollout import Rollouts, SamplingSettings, start_rollouts
from rl.scoring import to_sequence
from rl.store import RunFolder
from rl.types import ExtraRole, Pair, PairBatch, Prompt
from rl.weights import Probe

if TYPE_CHECKING:
    from pydantic import SecretStr
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from transformers import ProcessorMixin

START_TIMEOUT_S = 900.0
MAX_EMPTY_ROUNDS = 20
OUTCOMES = ("ties", "identical", "abstentions", "unjudged", "too_long")


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
        self.parts = parts(config.pairs)
        self.queue = BatchQueue(capacity=config.max_lag + 1, first_step=first_step)
        uncertain = self.parts.sampled.uncertain if self.parts.sampled else None
        self.uncertain = UncertainPairs(uncertain) if uncertain else None
        self.keys = keys
        self.first_step = first_step
        self.version = first_step - 1
        """The newest policy version of the learner."""
        self.stopping = False
        self.refusal: RaylignError | None = None
        self.reference: Reference | None = None
        self._broken: BaseException | None = None
        self._version = asyncio.Condition()
        self._ready_version = -1
        self._welcoming: asyncio.Task[None] | None = None
        self._seen_roles: set[ExtraRole] = set()
        self._round: tuple[int, list[Pair]] = (0, [])
        """First step and pairs of the round that is learned from again."""

    async def run(self) -> None:
        """Make the pairs of every step until there are enough, or a stop is asked for."""
        for step in range(self.first_step, self.config.loop.steps + 1):
            await self._wait_for_version(self.config.sampled_from(step))
            if self.stopping:
                break
            try:
                if (batch := self.store.read_batch(step)) is None:
                    batch = await self.make_batch(step)
                elif self.reference:
                    self.reference.remember(batch.pairs)
            except (JudgeError, NoPairs) as error:
                self._keep_spent()
                if step == 1:
                    raise
                self.journal.warn(str(error))  # the learner finishes what there is
                self.refusal = error
                break
            self.regime.stream.position = batch.position
            await self.queue.put(batch)
        await self.queue.close()

    async def make_batch(self, step: int) -> PairBatch:
        """The algorithm, one step of it: pairs from where the config says, scored under the reference and stored."""
        self.tools.begin()
        pairs = self.pairs_of_round(step)
        if pairs is None:
            pairs = await self.new_pairs(step)
        if self.uncertain:
            pairs = self.uncertain.mark(pairs)
        if self.reference:
            async with self.tools.phase("reference"):
                pairs = await self.reference.score(pairs)
        self._keep_spent()
        counts, seconds = dict(self.tools.counts), self.tools.seconds
        batch = PairBatch(step, tuple(pairs), self.regime.stream.position, counts, seconds, self.spent)
        self.store.write_batch(batch)
        return batch

    async def new_pairs(self, step: int) -> list[Pair]:
        """Pairs of the regime, with what else the loss wants scored; further prompts are taken until there are any."""
        if self.parts.needs_engines:
            self.journal.note("startup", first_rollout=self.journal.age)
        count, counts = self.config.loop.prompts_per_step, self.tools.counts
        for attempt in range(MAX_EMPTY_ROUNDS):
            if pairs := await self.regime.pairs(count, self.tools, self._seed(step, attempt)):
                roles = self.config.loss.extra_roles
                length = self.config.policy.max_length
                pairs = with_extras(pairs, roles, self.tools.samples, self.tools.processor, length)
                self._warn_of_missing(roles, pairs)
                return pairs
        told = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in OUTCOMES if counts[name])
        advice = "use pairs that differ, or raise policy.max_length"
        if self.parts.sampled:
            advice = "lower the margin, raise rollout.sampling.completions or temperature, or check the judge"
        raise NoPairs(f"step {step}: {counts['prompts']} prompts in a row made no pair ({told}); {advice}")

    def _warn_of_missing(self, roles: Collection[ExtraRole], pairs: Sequence[Pair]) -> None:
        """Say once what a loss wants of the pairs and never finds."""
        for role in roles:
            if role not in self._seen_roles and not any(extra.role == role for pair in pairs for extra in pair.extras):
                self.journal.warn(f"loss.kind {self.config.loss.kind}: no pair of this step has its `{role}` sequence")
            self._seen_roles.add(role)

    def pairs_of_round(self, step: int) -> list[Pair] | None:
        """The pairs of a later epoch of a round, from those of its first; None in the first epoch, or elsewhere."""
        settings = self.config.pairs
        if not isinstance(settings, IterativePairs) or (first := settings.first_step_of(step)) is None:
            return None
        if self._round[0] != first:
            steps = range(first, first + settings.steps_per_round)
            batches = [self.store.read_batch(one) for one in steps]
            self._round = first, [pair for batch in batches if batch for pair in batch.pairs]
        pairs = settings.replayed(self._round[1], step, self.config.seed)
        self.tools.counts.update(pairs=len(pairs), replayed=len(pairs))
        return pairs

    # What the driver calls.

    async def start(self) -> tuple[list["ActorHandle"], list[Probe]]:
        """Start the actors one after another and load the prompts; returns the rollout workers and a probe batch.

        The learner starts after this: on few cores, loading side by side takes far longer than in turn.
        """
        config = self.config
        before = self.store.read_batch(self.first_step - 1) if self.first_step > 1 else None
        workers = self._start_engines()
        processor = await asyncio.to_thread(load_processor, self.model)
        training, self.heldout = await asyncio.to_thread(config.data.load, config.seed, self.report)
        stored = await asyncio.to_thread(self._load_stored, processor)
        self._check(training, [pair.prompt for pair in stored], processor)
        self.regime = make_regime(config.pairs, training, stored, config.seed)
        self.regime.stream.position = before.position if before else 0
        self.journal.note("startup", prompts=self.journal.age)
        self.rollouts = Rollouts(workers)
        probes: list[Probe] = []
        if workers:
            probes = await self._make_probes(training)
            self.journal.note("startup", rollout_workers=self.journal.age)
        if (settings := config.reference_copy) is not None:
            self.reference = start_reference(settings, config.policy, self.model, self.logs)
            self.reference.remember(stored)
        self.tools = self._make_tools(processor)
        if self.uncertain:
            for step in range(max(1, self.first_step - self.uncertain.window), self.first_step):
                self.uncertain.observe(earlier.pairs if (earlier := self.store.read_batch(step)) else ())
        if workers and self.first_step == 1:  # they hold version 0 as they loaded it; the first publication proves it
            self._welcoming = asyncio.create_task(self._welcome(0))
        if isinstance(config.pairs, IterativePairs) and (self.first_step - 1) % config.pairs.round_steps:
            self.journal.warn(
                f"resumed inside a round: what is left of it is sampled from policy version {self.first_step - 1}"
            )
        return workers, probes

    def _start_engines(self) -> list["ActorHandle"]:
        if not self.parts.needs_engines:
            return []
        config = self.config
        return start_rollouts(
            config.rollout, config.policy, self.model, config.weights.transfer, self.logs, self.parts.needs_blind
        )

    def _load_stored(self, processor: "ProcessorMixin") -> list[Pair]:
        config = self.config
        if (settings := self.parts.stored) is None:
            return []
        length = config.policy.max_length
        return settings.load(self.parts.section, config.seed, processor, length, self.heldout, self.report)

    def _check(self, training: Sequence[Prompt], of_stored: Sequence[Prompt], processor: "ProcessorMixin") -> None:
        """Refuse prompts that could not be sampled, judged or measured on."""
        config = self.config
        if not self.parts.needs_engines:
            return
        if not self.heldout:
            raise DataError("data: no prompt is held out to measure the policy on; set data.heldout_share above 0")
        sampled = [*training, *of_stored]
        room = config.policy.max_length - max(config.rollout.sampling.max_tokens, config.loop.eval_max_tokens)
        check_prompts([*sampled, *self.heldout], processor, room, config.rollout.max_images)
        config.judge.check([*(sampled if self.parts.sampled else ()), *self.heldout])

    async def _make_probes(self, training: Sequence[Prompt]) -> list[Probe]:
        probed = training[: self.config.weights.probes]
        greedy = SamplingSettings(completions=1, temperature=0, max_tokens=self.config.rollout.sampling.max_tokens)
        answers = await asyncio.wait_for(self.rollouts.generate(probed, greedy, 0), START_TIMEOUT_S)
        return [Probe(prompt, to_sequence(prompt, answer)) for prompt, (answer,) in zip(probed, answers, strict=True)]

    def _make_tools(self, processor: "ProcessorMixin") -> Tools:
        config = self.config
        judge: Judge | None = None
        if self.parts.needs_engines:
            logps = self.reference.logps if self.reference else None
            judge = config.judge.build(JudgeContext(self.logs, self.keys, logps))
            judge.restore(self.store.read_spent())
        tools = Tools(
            self.rollouts, judge, processor, config.rollout.sampling, config.policy.max_length, asyncio.Lock()
        )
        equip(tools, config.pairs, config.policy, self.model, self.logs)
        return tools

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
        if self._welcoming:
            await self._welcoming
        if self._broken is not None:
            raise self._broken
        if self.parts.needs_engines and self.journal.last_evaluated != self.rollouts.version:
            await self.evaluate(self.rollouts.version)
        self.journal.close()
        return {
            "version": self.version,
            "startup": self.journal.startup,
            "peak_memory_bytes": self.memory.stop(),
            "refusal": self.refusal,
        }

    # What the learner calls.

    async def batch(self, step: int) -> PairBatch | None:
        """The pairs of a step; None if there are no more. Every rank asks, and gets the same."""
        if not self.parts.needs_engines:  # no version is published; by now a reference that changes is restored
            await self._set_ready(self.config.loop.steps)
        return await self.queue.get(step)

    async def pause(self) -> None:
        """Returns when no engine is generating; none will until `published`."""
        await self.tools.lock.acquire()

    async def published(self, version: int, metrics: dict[str, float]) -> None:
        """The engines hold `version`, proven by the probe; sampling goes on, after an evaluation if one is due."""
        is_new = version != self.rollouts.version or self._ready_version < 0
        self.rollouts.version = version
        self.tools.lock.release()
        self.journal.published(version, metrics)
        if is_new:
            self._welcoming = asyncio.create_task(self._welcome(version))

    async def updated(self, version: int, metrics: dict[str, float]) -> None:
        """The learner made `version` from the batch of the same number."""
        self.version = version
        self.journal.updated(version, metrics, self.queue.last(version))

    async def renew_reference(self, version: int, weights: "list[ObjectRef[Any]]", share: float) -> None:
        """Move the reference by `share` towards policy `version`, whose weights come in chunks."""
        assert self.reference is not None
        await self.reference.renew(f"{self.reference.base}+{version}", weights, share)

    async def renew_copy(self, weights: "list[ObjectRef[Any]]") -> None:
        """Give the copies that write with masked attention the policy's weights, which come in chunks."""
        assert self.tools.blind is not None
        await self.tools.blind.load(weights)

    async def reference_weights(self) -> "tuple[str, ObjectRef[Any]]":
        """The reference's version and weights, for a checkpoint."""
        assert self.reference is not None
        return self.reference.version, self.reference.weights()

    async def restore_reference(self, version: str, weights: "list[ObjectRef[Any]]") -> None:
        """Put back the reference of a checkpoint."""
        assert self.reference is not None
        await self.reference.renew(version, weights, 1.0)

    # Inside.

    async def evaluate(self, version: int) -> None:
        """Greedy answers to the held-out prompts, judged and measured against the base's."""
        started = time.perf_counter()
        greedy = SamplingSettings(completions=1, temperature=0, max_tokens=self.config.loop.eval_max_tokens)
        async with self.tools.lock:
            sampled = [group[0] for group in await self.rollouts.generate(self.heldout, greedy, 0)]
        judge = self.tools.judge
        assert judge is not None
        base = self.journal.base_answers() if version else {}
        groups = [[one] for one in sampled]
        if base and not judge.absolute:  # then the base's answers are judged again, beside the new ones
            groups = [[one, base[one.prompt_id].completion] for one in sampled]
        try:
            verdicts = await judge.grade(self.heldout, groups)
        except JudgeError as error:
            self.journal.warn(f"version {version} is not evaluated: {error}")
            return
        finally:
            self._keep_spent()
        if version == 0 or not judge.absolute:
            base = {g[-1].prompt_id: BaseAnswer(g[-1], v[-1].score) for g, v in zip(groups, verdicts, strict=True)}
        answers = [
            Answer(prompt, one, verdict[0])
            for prompt, one, verdict in zip(self.heldout, sampled, verdicts, strict=True)
        ]
        metrics = measure(answers, base, judge.absolute)
        self.journal.evaluated(version, metrics, answers, time.perf_counter() - started)

    async def _welcome(self, version: int) -> None:
        """Evaluate a version that is due, then let sampling use it; what goes wrong is raised where that waits."""
        every = self.config.loop.eval_every
        try:
            if version // every > self.journal.last_evaluated // every:
                await self.evaluate(version)
        except BaseException as error:
            self._broken = error
        await self._set_ready(version)

    async def _set_ready(self, version: int) -> None:
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

    @property
    def spent(self) -> dict[str, float]:
        """What judging took so far."""
        return self.tools.judge.spent if self.tools.judge else {}

    def _keep_spent(self) -> None:
        if self.tools.judge:
            self.store.write_spent(self.tools.judge.spent)
