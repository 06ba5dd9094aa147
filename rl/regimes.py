"""Where the pairs of a step come from: stored, sampled and judged now, a mixture, or made without any annotator.

A regime gives the pairs of one step; the loop scores them under the reference, stores them and queues them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Discriminator, Field, Tag

from cluster.connect import Role
from cluster.errors import DataError
from cluster.settings import Settings
from rl.bdhs import BdhsSettings, degrade
from rl.data import ShuffledStream
from rl.judges import Judge
from rl.masked import MaskedSettings, start_masked
from rl.pairs import PairSettings, check_references, make_pairs
from rl.policy import PolicySettings
from rl.render import written_completion
from rl.rollout import Blind, Rollouts, SamplingSettings
from rl.sight import DIFFUSION_STEPS
from rl.similarity import Similarity
from rl.stored import OfflinePairs
from rl.tables import Answers
from rl.types import Completion, Judgement, Pair, PairValues, Prompt, Source

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class IterativePairs(PairSettings):
    """Rounds: all pairs of a round are sampled from the policy as it was when the round began."""

    kind: Literal["iterative"]  # type: ignore[assignment]
    """Where pairs come from."""
    steps_per_round: int = Field(20, ge=1)
    """Steps for which a round samples anew."""
    epochs: int = Field(1, ge=1)
    """How often a round learns from its pairs; it has steps_per_round x epochs steps."""

    @property
    def round_steps(self) -> int:
        """Optimizer steps in one round."""
        return self.steps_per_round * self.epochs

    def first_step_of(self, step: int) -> int | None:
        """The first step of the round whose pairs `step` learns from again; None if it samples its own."""
        place = (step - 1) % self.round_steps
        return step - place if place >= self.steps_per_round else None

    def replayed(self, pairs: Sequence[Pair], step: int, seed: int) -> list[Pair]:
        """The share of the round's pairs that falls to a step of a later epoch, in an order of that epoch's own."""
        before, place = divmod(step - 1, self.round_steps)
        epoch, index = divmod(place, self.steps_per_round)
        order = np.random.default_rng([seed, before, epoch]).permutation(len(pairs))
        return [pairs[one] for one in np.array_split(order, self.steps_per_round)[index]]


class BdhsPairs(BdhsSettings):
    """BDHS (arXiv 2407.02477): chosen is the prompt's reference answer, rejected what the policy makes of it while it
    sees next to nothing. No judge is asked."""

    kind: Literal["bdhs"]
    """Where pairs come from."""
    masked: MaskedSettings = MaskedSettings()
    """The copies of the policy that `sight` mask needs."""

    async def reject(self, tools: "Tools", prompts: Sequence[Prompt], answers: Sequence[str], seed: int) -> list[str]:
        """A rejected answer for each ground-truth answer."""
        assert tools.blind is not None
        assert tools.similarity is not None
        sampling = SamplingSettings(completions=1, temperature=self.temperature, max_tokens=self.max_tokens)
        blind, calls = tools.blind, iter(range(self.tries))
        async with tools.lock, tools.phase("sampling"):
            rejected, counts = await degrade(
                prompts,
                answers,
                lambda requests: blind.go_on(requests, sampling, seed + next(calls)),
                tools.similarity,
                self,
                seed,
            )
        tools.counts.update(counts)
        return rejected


class PovidPairs(Settings):
    """POVID's distortion (arXiv 2402.11411): chosen is the prompt's reference answer, rejected the likeliest token at
    each of its places under a noised image."""

    kind: Literal["povid"]
    """Where pairs come from."""
    noise: int = Field(500, ge=1, lt=DIFFUSION_STEPS)
    """Diffusion step of the noise."""

    async def reject(self, tools: "Tools", prompts: Sequence[Prompt], answers: Sequence[str], seed: int) -> list[str]:
        """A rejected answer for each ground-truth answer."""
        written = [tools.written(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        async with tools.lock, tools.phase("sampling"):
            tokens = await tools.rollouts.distort(prompts, [one.token_ids for one in written], self.noise, seed)
        tokenizer = getattr(tools.processor, "tokenizer", tools.processor)
        return [tokenizer.decode(one, skip_special_tokens=True).strip() for one in tokens]


class ConstructedPairs(Settings):
    """Chosen is the true answer to a prompt of the tiny world, rejected a plausible corruption that nobody sampled."""

    kind: Literal["constructed"]
    """Where pairs come from."""

    async def reject(self, tools: "Tools", prompts: Sequence[Prompt], answers: Sequence[str], seed: int) -> list[str]:
        """A rejected answer for each ground-truth answer."""
        from rl.world.corruption import corrupted_answer

        rng = np.random.default_rng([seed, 29])
        return [corrupted_answer(prompt, rng) for prompt in prompts]


SelfMade = BdhsPairs | PovidPairs | ConstructedPairs


class MixedPairs(Settings):
    """Of each stored pair either itself or, for the same prompt, one sampled now (Mixed-DPO, arXiv 2407.02477)."""

    kind: Literal["mixed"]
    """Where pairs come from."""
    stored: OfflinePairs
    """The stored pairs."""
    sampled: PairSettings = PairSettings()
    """How judged completions make the other ones."""
    stored_share: float = Field(0.5, gt=0, lt=1)
    """Probability with which a stored pair is used as it is."""


class AveragedPairs(Settings):
    """Two rejected answers for one chosen: a stored one, and one that is made now (Avg-DPO, arXiv 2407.02477)."""

    kind: Literal["averaged"]
    """Where pairs come from."""
    stored: OfflinePairs
    """The stored pairs."""
    second: Annotated[SelfMade, Field(discriminator="kind")]
    """How the second rejected answer is made."""
    stored_weight: float = Field(0.5, gt=0, lt=1)
    """What the loss of the stored pair counts; the other counts the rest."""


def _kind(pairs: Any) -> str:
    """Online is meant where no kind is given."""
    return str(pairs.get("kind", "online") if isinstance(pairs, dict) else pairs.kind)


_Made = (
    Annotated[PairSettings, Tag("online")]
    | Annotated[BdhsPairs, Tag("bdhs")]
    | Annotated[PovidPairs, Tag("povid")]
    | Annotated[ConstructedPairs, Tag("constructed")]
)
# What can be made ahead, with the policy as it is.
MadePairs = Annotated[_Made, Discriminator(_kind)]
PairsSettings = Annotated[
    _Made
    | Annotated[IterativePairs, Tag("iterative")]
    | Annotated[OfflinePairs, Tag("offline")]
    | Annotated[MixedPairs, Tag("mixed")]
    | Annotated[AveragedPairs, Tag("averaged")],
    Discriminator(_kind),
]


class Parts(NamedTuple):
    """What a regime is made of."""

    sampled: PairSettings | None = None
    """How judged completions make pairs, if the judge has a say."""
    stored: OfflinePairs | None = None
    self_made: SelfMade | None = None
    section: str = "pairs.stored"
    """Where the settings of the stored pairs stand in the config."""

    @property
    def needs_engines(self) -> bool:
        """Whether anything is sampled."""
        return self.sampled is not None or self.needs_blind

    @property
    def needs_blind(self) -> bool:
        """Whether engines must be able to see less than a whole image."""
        return isinstance(self.self_made, BdhsPairs | PovidPairs)

    @property
    def needs_copy(self) -> bool:
        """Whether a copy of the policy outside the engines writes, and must be kept up to date."""
        return isinstance(self.self_made, BdhsPairs) and self.self_made.sight == "mask"


def parts(pairs: "PairsSettings") -> Parts:
    """The parts of a regime's settings."""
    match pairs:
        case PairSettings():
            return Parts(sampled=pairs)
        case OfflinePairs():
            return Parts(stored=pairs, section="pairs")
        case MixedPairs():
            return Parts(pairs.sampled, pairs.stored)
        case AveragedPairs():
            return Parts(stored=pairs.stored, self_made=pairs.second)
        case _:
            return Parts(self_made=pairs)


def masked_role(pairs: "PairsSettings") -> list[Role]:
    """The actor that holds a copy of the policy outside the engines, which can mask what it sees; mostly none."""
    made = parts(pairs).self_made
    if not isinstance(made, BdhsPairs) or made.sight == "drop":
        return []
    return [Role("masked policy", made.masked.workers, made.masked.resources)]


@dataclass
class Tools:
    """What pairs are made with. Every use of the engines waits for them, and is timed."""

    rollouts: Rollouts
    judge: Judge | None
    processor: "ProcessorMixin"
    sampling: SamplingSettings
    max_length: int
    """Most tokens of a prompt and its completion."""
    lock: asyncio.Lock
    """Held while engines generate, and by the learner while it publishes."""
    blind: Blind | None = None
    similarity: Similarity | None = None
    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[Completion]] = field(default_factory=dict)
    """The completions that were sampled, by prompt id."""

    def begin(self) -> None:
        """A new step: nothing is counted yet."""
        self.counts, self.seconds, self.samples = Counter(), {}, {}

    async def sample(self, prompts: Sequence[Prompt], seed: int) -> list[list[Completion]]:
        """Completions of each prompt from the current policy."""
        async with self.lock, self.phase("sampling"):
            completions = await self.rollouts.generate(prompts, self.sampling, seed)
        self.samples.update((prompt.id, group) for prompt, group in zip(prompts, completions, strict=True))
        self.counts.update(
            prompts=len(prompts),
            completions=sum(map(len, completions)),
            tokens=sum(len(one.token_ids) for group in completions for one in group),
        )
        return completions

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """The judge's verdicts."""
        assert self.judge is not None
        async with self.phase("judging"):
            return await self.judge.grade(prompts, completions)

    def written(self, prompt: Prompt, text: str) -> Completion:
        """An answer that was not sampled as it stands, in the policy's tokens."""
        return replace(written_completion(prompt, text, self.processor), policy_version=self.rollouts.version)

    def fits(self, completion: Completion) -> bool:
        """Whether a completion and its prompt are no longer than they may be."""
        return len(completion.prompt_token_ids) + len(completion.token_ids) <= self.max_length

    @asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        """Adds the time that the block takes to that phase of the step."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


async def sampled_answers(prompts: Sequence[Prompt], tools: Tools, settings: PairSettings, seed: int) -> list[Answers]:
    """What the judge is to compare: the policy's completions, and the reference answer if the rule takes it."""
    groups = await tools.sample(prompts, seed)
    answers = [Answers(prompt, tuple(group)) for prompt, group in zip(prompts, groups, strict=True)]
    takes_reference = settings.rule == "best_vs_reference"
    return [one.with_reference(tools.processor) for one in answers] if takes_reference else answers


async def judged_pairs(prompts: Sequence[Prompt], tools: Tools, settings: PairSettings, seed: int) -> list[Pair]:
    """Online DPO (arXiv 2407.02477 section 2; graded as in arXiv 2402.10884): sample, judge, pair."""
    completions = [one.completions for one in await sampled_answers(prompts, tools, settings, seed)]
    judgements = await tools.grade(prompts, completions)
    pairs, counts = make_pairs(prompts, completions, judgements, settings)
    tools.counts.update(counts)
    return pairs


async def self_made_pairs(
    prompts: Sequence[Prompt], answers: Sequence[str], tools: Tools, settings: SelfMade, seed: int
) -> list[Pair | None]:
    """Each answer chosen over what is made of it; None where that comes out the same or empty, or one is too long."""
    chosen = [tools.written(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    fits = [index for index, one in enumerate(chosen) if tools.fits(one)]
    rejected = await settings.reject(tools, [prompts[i] for i in fits], [answers[i] for i in fits], seed)
    pairs: list[Pair | None] = [None] * len(prompts)
    tools.counts.update(prompts=len(prompts), completions=len(fits), too_long=len(prompts) - len(fits))
    for index, text in zip(fits, rejected, strict=True):
        bad = tools.written(prompts[index], text)
        tools.counts["tokens"] += len(bad.token_ids)
        if " ".join(text.split()) in ("", " ".join(answers[index].split())):
            tools.counts["identical"] += 1
        elif not tools.fits(bad):
            tools.counts["too_long"] += 1
        else:
            pairs[index] = _self_made(prompts[index], chosen[index], bad, settings.kind)
    return pairs


def _self_made(prompt: Prompt, chosen: Completion, rejected: Completion, kind: Source) -> Pair:
    verdicts = PairValues(Judgement(1.0, None, "", kind, ""), Judgement(0.0, None, "", kind, ""))
    return Pair(prompt, PairValues(chosen, rejected), verdicts, 1.0, kind, rejected.policy_version)


async def mixed_pairs(stored: Sequence[Pair], tools: Tools, settings: MixedPairs, seed: int) -> list[Pair]:
    """a L_DPO(y+, y-) + (1 - a) L_DPO(sampled y+, sampled y-) with a from a Bernoulli distribution (arXiv 2407.02477,
    Mixed-DPO). A prompt whose samples make no pair is passed over, as in the online regime."""
    as_stored = np.random.default_rng([seed, 23]).random(len(stored)) < settings.stored_share
    kept = [pair for pair, keep in zip(stored, as_stored, strict=True) if keep]
    prompts = [pair.prompt for pair, keep in zip(stored, as_stored, strict=True) if not keep]
    sampled = await judged_pairs(prompts, tools, settings.sampled, seed) if prompts else []
    tools.counts.update(pairs=len(kept))
    return kept + sampled


async def averaged_pairs(stored: Sequence[Pair], tools: Tools, settings: AveragedPairs, seed: int) -> list[Pair]:
    """g L_DPO(y+, y-) + (1 - g) L_DPO(y+, self-made y-) (arXiv 2407.02477, Avg-DPO), as two pairs that count g and
    1 - g. Where the second comes out the same as y+, the stored pair counts alone."""
    answers = [pair.completions.chosen.text for pair in stored]
    made = await self_made_pairs([pair.prompt for pair in stored], answers, tools, settings.second, seed)
    pairs = []
    for first, second in zip(stored, made, strict=True):
        if second is None:
            pairs.append(first)
        else:
            pairs += [replace(first, weight=settings.stored_weight), replace(second, weight=1 - settings.stored_weight)]
    tools.counts.update(pairs=len(pairs))
    return pairs


async def prompted_pairs(prompts: Sequence[Prompt], tools: Tools, settings: SelfMade, seed: int) -> list[Pair]:
    """Pairs made of the prompts' own reference answers."""
    made = await self_made_pairs(prompts, [one.reference_answer or "" for one in prompts], tools, settings, seed)
    pairs = [pair for pair in made if pair is not None]
    tools.counts.update(pairs=len(pairs))
    return pairs


async def stored_pairs(stored: Sequence[Pair], tools: Tools, seed: int) -> list[Pair]:
    """Offline: the pairs as they are."""
    tools.counts.update(pairs=len(stored))
    return list(stored)


def equip(tools: Tools, pairs: "PairsSettings", policy: PolicySettings, model: str, logs: Path) -> None:
    """Give the tools what self-made pairs need: a similarity, and who writes with restricted sight."""
    made = parts(pairs).self_made
    if isinstance(made, BdhsPairs):
        tools.similarity = made.similarity.build()
        tools.blind = Blind(tools.rollouts.workers)
        if made.sight == "mask":
            tools.blind = Blind(start_masked(made.masked, policy, model, logs))


class Regime:
    """Pairs step by step: the next prompts or stored pairs, in an order that the seed settles, and what makes pairs of
    them."""

    def __init__(self, items: Sequence[Any], make: Callable[..., Awaitable[list[Pair]]], seed: int):
        self.stream: ShuffledStream[Any] = ShuffledStream(items, seed)
        self._make = make

    async def pairs(self, count: int, tools: Tools, seed: int) -> list[Pair]:
        """Pairs from the next `count` prompts or stored pairs, some of which may make none, or several."""
        return await self._make(self.stream.take(count), tools, seed=seed)


def make_regime(settings: "PairsSettings", prompts: Sequence[Prompt], stored: Sequence[Pair], seed: int) -> Regime:
    """The regime of the settings. `stored` are the stored pairs, if it uses any.

    Raises:
        DataError: prompts lack the reference answer that a pair would be made of.
    """
    match settings:
        case PairSettings():
            check_references(prompts, settings)
            return Regime(prompts, partial(judged_pairs, settings=settings), seed)
        case OfflinePairs():
            return Regime(stored, stored_pairs, seed)
        case MixedPairs():
            check_references([pair.prompt for pair in stored], settings.sampled)
            return Regime(stored, partial(mixed_pairs, settings=settings), seed)
        case AveragedPairs():
            if settings.second.kind == "constructed":
                check_truths([pair.prompt for pair in stored])
            return Regime(stored, partial(averaged_pairs, settings=settings), seed)
        case _:
            check_answers(prompts, settings.kind)
            return Regime(prompts, partial(prompted_pairs, settings=settings), seed)


def check_answers(prompts: Sequence[Prompt], kind: Source) -> None:
    """Refuse prompts without what a rejected answer is made of.

    Raises:
        DataError: names one by id.
    """
    for prompt in prompts:
        if not prompt.reference_answer:
            raise DataError(
                f"prompt {prompt.id} has no reference answer, of which pairs.kind {kind} makes pairs; give `answer` in "
                f"its row or leave it out"
            )
    if kind == "constructed":
        check_truths(prompts)


def check_truths(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that are not of the tiny world.

    Raises:
        DataError: names one by id.
    """
    for prompt in prompts:
        if prompt.truth is None:
            raise DataError(f"prompt {prompt.id} is not of the tiny world, which pairs.kind constructed works in")
