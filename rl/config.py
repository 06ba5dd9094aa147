"""The whole config of an alignment run, composed from the parts' own settings."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.connect import ActorResources, ClusterSettings, Role
from cluster.errors import ConfigError
from cluster.settings import Settings
from rl.adapters import ENGINE_RANKS
from rl.data import DataSettings, WorldData
from rl.engine import OptimizerSettings
from rl.judges import ImplicitSettings, JudgeBase, JudgeSettings, OracleSettings
from rl.objective import LossSettings
from rl.pairs import PairSettings
from rl.policy import PolicySettings
from rl.reference import BASE_OF_ADAPTER, ReferenceChoice, ReferenceSettings
from rl.regimes import IterativePairs, PairsSettings, Parts, masked_role, parts
from rl.rollout import RolloutSettings, SamplingSettings
from rl.weights import WeightSettings

BF16_TOLERANCE = 0.01


class RunSettings(Settings):
    """Where the run writes."""

    dir: str = "runs/align"
    """The run folder: a path or an fsspec address (s3://…). Inside a Ray job a relative path lies under ~/raylign."""


class LoopSettings(Settings):
    """How long the loop runs, and how far its halves may be apart."""

    steps: int = Field(20, ge=1)
    """Optimizer steps; each makes the next policy version."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts, or stored pairs, for one step."""
    max_lag: int = Field(1, ge=0)
    """How many policy versions a pair may be older than the learner: 0 is strictly on-policy, 1 samples the next
    batch while the learner trains."""
    stale: Literal["drop", "weight"] = "drop"
    """What becomes of pairs that are older than max_lag: `drop` leaves them out, `weight` multiplies their loss by how
    likely the policy still makes their completions, against the sampler's own log-probs (as WPO, arXiv 2406.11827)."""
    sync_every: int = Field(1, ge=1)
    """Steps between two publications of the weights; at most max_lag + 1, unless older pairs are weighted."""
    eval_every: int = Field(10, ge=1)
    """Steps between evaluations on held-out prompts; there is always one at either end."""
    checkpoint_every: int = Field(10, ge=1)
    """Steps between checkpoints; there is always one at the end."""
    checkpoints_kept: int = Field(2, ge=1)
    """How many of the newest checkpoints stay."""
    eval_max_tokens: int = Field(64, ge=1)
    """Longest completion in evaluations, which decode greedily."""


class LearnerSettings(Settings):
    """The training workers."""

    workers: int = Field(2, ge=1)
    """Ray Train workers, each one rank of DeepSpeed."""
    resources: ActorResources = ActorResources(cpus=0.25, threads=1)
    """Of one worker."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How weights are updated."""


class AlignConfig(Settings):
    """Alignment: sample, judge, pair, score, update, publish; or learn from pairs that exist."""

    seed: int = 0
    """Of prompt order, sampling and initial adapters."""
    run: RunSettings = RunSettings()
    """Where the run writes."""
    loop: LoopSettings = LoopSettings()
    """Steps and lag."""
    policy: PolicySettings = PolicySettings()
    """The model to align."""
    data: DataSettings = WorldData()
    """Where prompts come from."""
    rollout: RolloutSettings = RolloutSettings()
    """The sampling engines."""
    judge: JudgeSettings = OracleSettings()
    """Who says which completion is better."""
    pairs: PairsSettings = PairSettings()
    """Where pairs come from, and how they are chosen."""
    loss: LossSettings = LossSettings()
    """What the learner minimises."""
    reference: ReferenceChoice = ReferenceSettings()
    """The frozen model that the loss compares with. With policy.lora it may be `base-of-adapter`, the policy itself
    with its adapters off: no second copy in memory, one more forward pass in the learner."""
    learner: LearnerSettings = LearnerSettings()
    """The training workers."""
    weights: WeightSettings = WeightSettings()
    """How new weights reach the sampling engines."""
    cluster: ClusterSettings = ClusterSettings()
    """Which Ray cluster to use."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "AlignConfig":
        made = parts(self.pairs)
        self._check_reference()
        self._check_loss(made)
        if self.loop.stale == "weight" and made.sampled is None:
            raise ConfigError(
                f"loop.stale is weight, but pairs.kind {self.pairs.kind} has no log-probs of a sampler to weigh by: "
                f"leave it out"
            )
        if made.needs_engines:
            self._check_engines(made)
        if made.sampled is not None:
            check_judging(self.judge, made.sampled, self.rollout.sampling, self.reference)
        return self

    def _check_engines(self, made: Parts) -> None:
        loop, sampling = self.loop, self.rollout.sampling
        if isinstance(self.pairs, IterativePairs):
            self._check_rounds(self.pairs)
        elif loop.sync_every > loop.max_lag + 1 and loop.stale == "drop" and not made.stored:
            raise ConfigError(
                f"loop.sync_every is {loop.sync_every}, but with loop.max_lag {loop.max_lag} pairs would be too old "
                f"before newer weights come: set loop.max_lag to {loop.sync_every - 1} or more"
                + (", or loop.stale to weight" if made.sampled else "")
            )
        if max(sampling.max_tokens, loop.eval_max_tokens) >= self.policy.max_length:
            raise ConfigError(
                f"policy.max_length is {self.policy.max_length}, which leaves no room for a prompt beside "
                f"rollout.sampling.max_tokens {sampling.max_tokens} and loop.eval_max_tokens {loop.eval_max_tokens}"
            )
        if self.policy.precision == "bfloat16" and self.weights.tolerance < BF16_TOLERANCE:
            raise ConfigError(
                f"weights.tolerance is {self.weights.tolerance:g}, but in bfloat16 trainer and engine differ by some "
                f"hundredths of a nat per token: set it to 0.1"
            )
        if (lora := self.policy.lora) is not None and (lora.published_rank or 0) > ENGINE_RANKS[-1]:
            raise ConfigError(
                f"policy.lora.rank is {lora.rank}, but the engines take adapters up to rank {ENGINE_RANKS[-1]}, and "
                f"those of kind pissa up to half of it"
            )
        if self.reference == BASE_OF_ADAPTER and self.judge.needs_reference:
            raise ConfigError(
                "reference is base-of-adapter, but judge.kind implicit needs reference workers: set reference.model"
            )
        if self.weights.transfer == "nccl" and self.rollout.resources.gpus == 0:
            raise ConfigError("weights.transfer is nccl, but rollout.resources.gpus is 0: use object_store on CPUs")

    def _check_loss(self, made: Parts) -> None:
        kinds = self.loss.terms
        if made.sampled is not None and made.sampled.uncertain and not self.loss.heeds_noise:
            raise ConfigError(f"pairs.uncertain smooths labels, which loss.kind {self.loss.kind} does not heed")
        if "poft" in kinds and (self.reference == BASE_OF_ADAPTER or self.reference.model is None):
            raise ConfigError("loss.kind poft compares with an aligned model: set reference.model to one")
        if "d2o" in kinds and made.sampled is None:
            raise ConfigError(
                "loss.kind d2o learns from samples of the policy: it needs a pairs.kind that samples some"
            )
        if "cut" in kinds and made.sampled is None and made.stored is None:
            raise ConfigError(
                f"loss.kind cut learns from a judge's reasons, and pairs.kind {self.pairs.kind} asks none"
            )

    def _check_reference(self) -> None:
        if self.reference == BASE_OF_ADAPTER:
            self._check_own_reference()
            return
        reference, defaults = self.reference, ReferenceSettings()
        if reference.update == "round" and not isinstance(self.pairs, IterativePairs):
            raise ConfigError("reference.update is round, but only pairs.kind iterative has rounds: use average")
        if reference.update != "fixed" and self.reference_copy is None:
            raise ConfigError(
                f"reference.update is {reference.update}, but with loss.kind {self.loss.kind} nothing needs a "
                f"reference: leave it out"
            )
        moved = (reference.every, reference.share) != (defaults.every, defaults.share)
        if moved and reference.update != "average":
            raise ConfigError("reference.every and reference.share belong to reference.update average: set it")

    def _check_own_reference(self) -> None:
        if self.policy.lora is None:
            raise ConfigError("reference is base-of-adapter, but there is no adapter to switch off: set policy.lora")
        if self.policy.lora.kind == "pissa":
            raise ConfigError(
                "reference is base-of-adapter, but with policy.lora.kind pissa switching the adapter off leaves the "
                "residual weights, not the model it started from: leave reference out"
            )
        if not self.loss.needs_reference:
            raise ConfigError(
                f"reference is base-of-adapter, but with loss.kind {self.loss.kind} nothing needs a reference: leave "
                f"it out"
            )

    def _check_rounds(self, pairs: IterativePairs) -> None:
        if self.loop.sync_every != 1:
            raise ConfigError("loop.sync_every has no meaning with pairs.kind iterative: leave it out")
        if self.loop.stale == "drop" and self.loop.max_lag < pairs.round_steps - 1:
            raise ConfigError(
                f"loop.max_lag is {self.loop.max_lag}, but a round has {pairs.round_steps} steps, of which the later "
                f"would lose their pairs: set loop.max_lag to {pairs.round_steps - 1}, or loop.stale to weight"
            )

    @property
    def sync_every(self) -> int:
        """Steps between two publications of the weights."""
        return self.pairs.round_steps if isinstance(self.pairs, IterativePairs) else self.loop.sync_every

    @property
    def max_lag(self) -> int:
        """How many versions the sampling half may run ahead of the learner."""
        return max(self.loop.max_lag, self.sync_every - 1)

    def sampled_from(self, step: int) -> int:
        """The policy version that the engines must hold, or a later one, before a step's pairs are made."""
        newest = (step - 1) // self.sync_every * self.sync_every
        return newest if isinstance(self.pairs, IterativePairs) else min(max(0, step - 1 - self.loop.max_lag), newest)

    @property
    def reference_copy(self) -> ReferenceSettings | None:
        """The reference's own actors; None if none is needed, or the policy with its adapters off stands for it."""
        judged = parts(self.pairs).needs_engines and self.judge.needs_reference
        return self.reference if self.reference != BASE_OF_ADAPTER and (self.loss.needs_reference or judged) else None

    def renews_reference(self, version: int) -> bool:
        """Whether the reference changes once the learner has made `version`."""
        if (reference := self.reference_copy) is None:
            return False
        every = {"fixed": 0, "round": self.sync_every, "average": reference.every}[reference.update]
        return every > 0 and version % every == 0

    @property
    def roles(self) -> list[Role]:
        """Every kind of actor the run places, in the order of their start."""
        made = parts(self.pairs)
        roles = []
        if made.needs_engines:
            roles.append(Role("rollout worker", self.rollout.workers, self.rollout.resources))
        if (reference := self.reference_copy) is not None:
            roles.append(Role("reference worker", reference.workers, reference.resources))
        roles += masked_role(self.pairs)
        if made.needs_engines:
            roles += self.judge.roles
        return [*roles, Role("learner worker", self.learner.workers, self.learner.resources)]


def check_judging(
    judge: JudgeBase, pairs: PairSettings, sampling: SamplingSettings, reference: ReferenceChoice
) -> None:
    """Refuse settings with which no pair could ever be made.

    Raises:
        ConfigError: says which.
    """
    candidates = sampling.completions + (pairs.rule == "best_vs_reference")
    if candidates < 2:
        raise ConfigError("rollout.sampling.completions is 1, but a pair needs two: set it to 2 or more")
    if isinstance(judge, ImplicitSettings) and reference != BASE_OF_ADAPTER and reference.model is None:
        raise ConfigError(
            "judge.kind implicit compares the policy with the reference, which would be the same model: set "
            "reference.model to the one that policy.model was aligned from"
        )
    if pairs.rule == "best_vs_reference" and judge.needs_reference:
        raise ConfigError("pairs.rule best_vs_reference needs a judge of texts: nobody sampled the reference answers")
    if sampling.temperature == 0 and pairs.rule != "best_vs_reference":
        raise ConfigError("rollout.sampling.temperature is 0, so all completions would be equal: set it above 0")
    top = judge.top_score(candidates)
    if top is not None and pairs.margin > top:
        raise ConfigError(f"pairs.margin is {pairs.margin:g}, but no score of this judge is above {top:g}: lower it")
