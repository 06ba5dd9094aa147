"""Judges: who says which completion is better. A new judge is one file here and one name in `_Single`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from cluster.connect import Role
from cluster.settings import Settings
from rl.judges.base import Judge, JudgeBase, JudgeContext, collect_keys
from rl.judges.ensemble import EnsembleJudge
from rl.judges.gemini import GeminiSettings
from rl.judges.implicit import ImplicitSettings
from rl.judges.openai_compatible import OpenAISettings
from rl.judges.oracle import OracleSettings
from rl.judges.reward import RewardSettings
from rl.judges.rules import RulesSettings
from rl.types import Prompt

_Single = OracleSettings | GeminiSettings | OpenAISettings | RewardSettings | ImplicitSettings | RulesSettings
SingleJudge = Annotated[_Single, Field(discriminator="kind")]


class Member(Settings):
    """One judge of an ensemble."""

    judge: SingleJudge
    """Any judge but an ensemble."""
    weight: float = Field(1.0, gt=0)
    """Of its score, as it is, in the mean."""


class EnsembleSettings(JudgeBase):
    """The weighted mean of several judges' scores; how often two of them disagree is counted."""

    kind: Literal["ensemble"]
    """Which judge."""
    members: tuple[Member, ...] = Field(min_length=2)
    """A list of judges with their weights."""

    @property
    def roles(self) -> list[Role]:
        return [role for member in self.members for role in member.judge.roles]

    @property
    def key_names(self) -> set[str]:
        return {name for member in self.members for name in member.judge.key_names}

    def check_setup(self) -> None:
        """See `JudgeBase.check_setup`."""
        for member in self.members:
            member.judge.check_setup()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """See `JudgeBase.check`."""
        for member in self.members:
            member.judge.check(prompts)

    @property
    def needs_reference(self) -> bool:
        return any(member.judge.needs_reference for member in self.members)

    def build(self, context: JudgeContext) -> EnsembleJudge:
        """The judge, with its members."""
        return EnsembleJudge([(member.judge.build(context), member.weight) for member in self.members])


JudgeSettings = Annotated[_Single | EnsembleSettings, Field(discriminator="kind")]

__all__ = [
    "EnsembleSettings",
    "ImplicitSettings",
    "Judge",
    "JudgeBase",
    "JudgeContext",
    "JudgeSettings",
    "OracleSettings",
    "collect_keys",
]
