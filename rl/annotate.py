"""Annotation: the policy's own answers, judged and made into pairs, a step of prompts at a time.

What the online loop does without learning. Every step lies on disk before it is judged, and every paid reply in the
judge's cache before it is used, so that a run can end anywhere and go on with nothing lost or paid for twice.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, model_validator

from cluster.connect import ClusterSettings, Role
from cluster.errors import ConfigError, DataError
from cluster.settings import Settings
from rl.config import RunSettings, check_judging
from rl.data import DataSettings, Report, WorldData, check_prompts
from rl.judges import Judge, JudgeContext, JudgeSettings, OracleSettings
from rl.pairs import PairSettings, make_pairs
from rl.policy import PolicySettings, load_processor
from rl.reference import ReferenceSettings, start_reference
from rl.regimes import (
    MadePairs,
    Parts,
    SelfMade,
    Tools,
    equip,
    make_regime,
    masked_role,
    parts,
    prompted_pairs,
    sampled_answers,
)
from rl.rollout import Rollouts, RolloutSettings, start_rollouts
from rl.store import RunFolder
from rl.tables import Answers
from rl.types import PairBatch, Prompt

START_TIMEOUT_S = 900.0


class AnnotateConfig(Settings):
    """A set of pairs from a model's own answers."""

    seed: int = 0
    """Of sampling and of the order of a mixture."""
    run: RunSettings = RunSettings(dir="runs/annotate")
    """Where the answers, pairs and report are written."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts sampled, judged and written together."""
    policy: PolicySettings = PolicySettings()
    """The model that answers."""
    data: DataSettings = WorldData()
    """Where prompts come from; those held out are not annotated."""
    rollout: RolloutSettings = RolloutSettings()
    """The sampling engines."""
    judge: JudgeSettings = OracleSettings()
    """Who says which completion is better."""
    pairs: MadePairs = PairSettings()
    """How pairs are chosen; or how rejected answers are made of the prompts' own, for which no judge is asked."""
    reference: ReferenceSettings = ReferenceSettings()
    """The frozen model; started only for a judge that needs it."""
    cluster: ClusterSettings = ClusterSettings()
    """Which Ray cluster to use."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "AnnotateConfig":
        if (rule := self.parts.sampled) is not None:
            check_judging(self.judge, rule, self.rollout.sampling, self.reference)
            if rule.uncertain is not None:
                raise ConfigError("pairs.uncertain smooths labels while a policy learns: set it in align, not here")
        return self

    @property
    def parts(self) -> Parts:
        """What pairs are made with."""
        return parts(self.pairs)

    @property
    def uses_reference(self) -> bool:
        """Whether a copy of the reference is started."""
        return self.parts.sampled is not None and self.judge.needs_reference

    @property
    def roles(self) -> list[Role]:
        """Every kind of actor the job places."""
        reference = [Role("reference worker", self.reference.workers, self.reference.resources)]
        engines = [Role("rollout worker", self.rollout.workers, self.rollout.resources)]
        return [
            *(engines if self.parts.needs_engines else []),
            *(reference if self.uses_reference else []),
            *masked_role(self.pairs),
            *(self.judge.roles if self.parts.sampled else []),
        ]


class Annotation:
    """One run of the job."""

    def __init__(
        self,
        config: AnnotateConfig,
        model: str,
        folder: RunFolder,
        logs: Path,
        keys: dict[str, SecretStr],
        report: Report,
    ):
        """Load the prompts and start the actors.

        Raises:
            DataError: prompts are missing or unusable; see `DataSettings`.
        """
        self._config, self._folder = config, folder
        processor = load_processor(model)
        sets = config.data.load(config.seed, report)
        self.prompts, self.held_out = sets.training, len(sets.heldout)
        room = config.policy.max_length - config.rollout.sampling.max_tokens
        check_prompts(self.prompts, processor, room, config.rollout.max_images)
        if config.parts.sampled:
            config.judge.check(self.prompts)
        make_regime(config.pairs, self.prompts, (), config.seed)  # refuses prompts of which no pair could be made
        workers = []
        if config.parts.needs_engines:
            blind = config.parts.needs_blind
            workers = start_rollouts(config.rollout, config.policy, model, "object_store", logs, blind)
        reference = start_reference(config.reference, config.policy, model, logs) if config.uses_reference else None
        judge = config.judge if config.parts.sampled else OracleSettings()  # which then is asked nothing
        self.judge: Judge = judge.build(JudgeContext(logs, keys, reference.logps if reference else None))
        self._tools = Tools(
            Rollouts(workers), self.judge, processor, config.rollout.sampling, config.policy.max_length, asyncio.Lock()
        )
        equip(self._tools, config.pairs, config.policy, model, logs)
        self._stopping = False

    async def run(self, progress: Callable[[PairBatch], None]) -> bool:
        """Annotate all prompts that are not yet, sampling one step ahead of the judge; `progress` is told of each
        step, those done before included. Returns whether all is done.

        Raises:
            JudgeError: the judge cannot be asked any more; what is done stays.
        """
        size = self._config.prompts_per_step
        shares = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        done = set(self._folder.steps())
        self.judge.restore(self._folder.read_spent())
        for step in sorted(done):
            self._check_same_prompts(step, shares)
            batch = self._folder.read_batch(step)
            assert batch is not None
            progress(batch)
        todo = [(step, share) for step, share in enumerate(shares, start=1) if step not in done]
        try:
            return await self._annotate(todo, progress)
        finally:
            self._folder.write_spent(self.judge.spent)

    async def _annotate(
        self, todo: Sequence[tuple[int, Sequence[Prompt]]], progress: Callable[[PairBatch], None]
    ) -> bool:
        ahead: asyncio.Task[list[Answers]] | None = None
        for index, (step, share) in enumerate(todo):
            sampled = await (ahead or self._sample(step, share))
            if self._stopping:
                return False
            ahead = asyncio.create_task(self._sample(*todo[index + 1])) if index + 1 < len(todo) else None
            try:
                progress(await self._judge(step, sampled))
            except BaseException:
                if ahead is not None:  # it ends soon, and its answers are kept
                    await asyncio.gather(ahead, return_exceptions=True)
                raise
        return True

    def stop(self) -> None:
        """Begin nothing more; `run` ends once what is under way has come."""
        self._stopping = True
        self.judge.stop()

    def _check_same_prompts(self, step: int, shares: Sequence[Sequence[Prompt]]) -> None:
        """Rows that were added, removed or changed since shift the prompts of all steps behind them."""
        before = [one.prompt.id for one in self._folder.read_answers(step) or ()]
        now = [prompt.id for prompt in shares[step - 1]] if step <= len(shares) else []
        if before != now:
            raise DataError(
                f"data: the prompts of step {step} are not those that were annotated before: the data has changed. "
                f"Annotate it into another run.dir; replies of a cached judge are not paid for again"
            )

    async def _sample(self, step: int, prompts: Sequence[Prompt]) -> list[Answers]:
        """The step's answers, from disk if they are there."""
        known = self._folder.read_answers(step)
        if known is not None and [one.prompt.id for one in known] == [prompt.id for prompt in prompts]:
            return known
        rule = self._config.parts.sampled
        if rule is None:  # what is written beside the given answer is made together with the pairs
            answers = [Answers(one, ()).with_reference(self._tools.processor) for one in prompts]
        else:
            self._tools.begin()
            answers = await sampled_answers(prompts, self._tools, rule, self._seed(step))
        self._folder.write_answers(step, answers)
        return answers

    def _seed(self, step: int) -> int:
        return self._config.seed * 1_000_003 + step

    async def _judge(self, step: int, answers: Sequence[Answers]) -> PairBatch:
        prompts = [one.prompt for one in answers]
        if (made := self._config.parts.self_made) is not None:
            return await self._degrade(step, prompts, made)
        completions = [one.completions for one in answers]
        judgements = await self.judge.grade(prompts, completions)
        assert self._config.parts.sampled is not None
        pairs, counts = make_pairs(prompts, completions, judgements, self._config.parts.sampled)
        judged = [Answers(one.prompt, one.completions, tuple(v)) for one, v in zip(answers, judgements, strict=True)]
        self._folder.write_answers(step, judged)
        tokens = sum(len(one.token_ids) for group in completions for one in group)
        counts.update(prompts=len(prompts), completions=sum(map(len, completions)), tokens=tokens)
        self._folder.write_spent(self.judge.spent)
        batch = PairBatch(step, tuple(pairs), len(prompts), dict(counts), {}, self.judge.spent)
        self._folder.write_batch(batch)
        return batch

    async def _degrade(self, step: int, prompts: Sequence[Prompt], settings: SelfMade) -> PairBatch:
        """Pairs of the prompts' own answers and what the policy makes of them."""
        self._tools.begin()
        pairs = await prompted_pairs(prompts, self._tools, settings, self._seed(step))
        counts, seconds = dict(self._tools.counts), self._tools.seconds
        batch = PairBatch(step, tuple(pairs), len(prompts), counts, seconds, self.judge.spent)
        self._folder.write_batch(batch)
        return batch


def totals(batches: Sequence[PairBatch]) -> dict[str, Any]:
    """What all steps together came to, and what judging took; keys as in `PairBatch.counts`, and `judge_…`."""
    counts: dict[str, Any] = {}
    for batch in batches:
        for name, value in batch.counts.items():
            counts[name] = counts.get(name, 0) + value
    last = max(batches, key=lambda batch: batch.step, default=None)
    return counts | ({f"judge_{name}": value for name, value in last.judging.items()} if last else {})
