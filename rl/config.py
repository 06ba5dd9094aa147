"""The whole config of an alignment run, composed from the parts' own settings."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.connect import ActorResources, ClusterSettings, Role
from cluster.errors import ConfigError
from cluster.settings import Settings
from rl.data import DataSettings, WorldData
from rl.engine import OptimizerSettings
from rl.judges import ImplicitSettings, JudgeBase, JudgeSettings, OracleSettings
from rl.losses import LossSettings
from rl.pairs import PairSettings
from rl.policy import PolicySettings
from rl.reference import ReferenceSettings
from rl.rollout import RolloutSettings, SamplingSettings
from rl.stored import OfflinePairs
from rl.weights import WeightSettings

# Online is meant where no kind is given.
PairsSettings = Annotated[
    Annotated[PairSettings, Tag("online")] | Annotated[OfflinePairs, Tag("offline")],
    Discriminator(lambda pairs: pairs.get("kind", "online") if isinstance(pairs, dict) else pairs.kind),
]


BF16_TOLERANCE = 0.01


class RunSettings(Settings):
    """Where the run writes."""

    dir: str = "runs/align"
    """The run folder: a path or an fsspec address (s3://…). Inside a Ray job a relative path lies under ~/raylign."""


class LoopSettings(Settings):
    """The online loop."""

    steps: int = Field(20, ge=1)
    """Optimizer steps; each makes the next policy version."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts sampled for one step."""
    max_lag: int = Field(1, ge=0)
    """How many policy versions a pair may be older than the learner: 0 is strictly on-policy, 1 samples the next
    batch while the learner trains."""
    sync_every: int = Field(1, ge=1)
    """Steps between two publications of the weights; at most max_lag + 1."""
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
    """Online alignment: sample, judge, pair, score, update, publish."""

    seed: int = 0
    """Of prompt order, sampling and initial adapters."""
    run: RunSettings = RunSettings()
    """Where the run writes."""
    loop: LoopSettings = LoopSettings()
    """The online loop."""
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
    reference: ReferenceSettings = ReferenceSettings()
    """The frozen model that the loss compares with."""
    learner: LearnerSettings = LearnerSettings()
    """The training workers."""
    weights: WeightSettings = WeightSettings()
    """How new weights reach the sampling engines."""
    cluster: ClusterSettings = ClusterSettings()
    """Which Ray cluster to use."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "AlignConfig":
        loop, sampling = self.loop, self.rollout.sampling
        if loop.sync_every > loop.max_lag + 1:
            raise ConfigError(
                f"loop.sync_every is {loop.sync_every}, but with loop.max_lag {loop.max_lag} the sampler would wait "
                f"for weights that never come: set loop.max_lag to {loop.sync_every - 1} or more"
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
        if self.weights.transfer == "nccl" and self.rollout.resources.gpus == 0:
            raise ConfigError("weights.transfer is nccl, but rollout.resources.gpus is 0: use object_store on CPUs")
        if self.loss.kind != "sigmoid" and (self.loss.label_smoothing > 0 or getattr(self.pairs, "uncertain", None)):
            raise ConfigError(
                f"loss.label_smoothing and pairs.uncertain work with loss.kind sigmoid only, not {self.loss.kind}"
            )
        if isinstance(self.pairs, PairSettings):
            check_judging(self.judge, self.pairs, sampling, self.reference)
        return self

    @property
    def roles(self) -> list[Role]:
        """Every kind of actor the run places, in the order of their start."""
        return [
            Role("rollout worker", self.rollout.workers, self.rollout.resources),
            Role("reference worker", self.reference.workers, self.reference.resources),
            *self.judge.roles,
            Role("learner worker", self.learner.workers, self.learner.resources),
        ]


def check_judging(
    judge: JudgeBase, pairs: PairSettings, sampling: SamplingSettings, reference: ReferenceSettings
) -> None:
    """Refuse settings with which no pair could ever be made.

    Raises:
        ConfigError: says which.
    """
    candidates = sampling.completions + (pairs.rule == "best_vs_reference")
    if candidates < 2:
        raise ConfigError("rollout.sampling.completions is 1, but a pair needs two: set it to 2 or more")
    if isinstance(judge, ImplicitSettings) and reference.model is None:
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
