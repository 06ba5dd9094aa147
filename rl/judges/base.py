"""What every judge does, and what it is made with."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from cluster.connect import Role
from cluster.errors import ConfigError
from cluster.settings import Settings
from rl.types import Completion, Judgement, Prompt

T = TypeVar("T")


class Judge(ABC):
    """Grades all completions of each prompt together; never guesses.

    A graded judge fills in attributes; a pairwise judge compares and leaves them None; either gives None as the
    score of what it cannot judge (an abstention), and says why in `reason`.
    """

    name: str
    absolute = True
    """Whether scores of different calls can be compared; if not, only those of one prompt in one call can."""

    def __init__(self) -> None:
        self.tally: Counter[str] = Counter()
        """What judging took so far: calls, cached, retries, input_tokens, output_tokens, order_checked,
        order_consistent, … as far as they mean something for the judge."""
        self.cost = 0.0
        """What judging cost so far, in the currency of the prices in the config."""

    @abstractmethod
    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """One judgement per completion, in the shape of `completions`.

        Raises:
            JudgeError: the judge cannot be asked at all: no answer, no permission, no budget left.
        """

    @property
    def spent(self) -> dict[str, float]:
        """Tally and cost together, to be stored and given back to `restore`."""
        return {**self.tally, "cost": self.cost}

    def restore(self, spent: Mapping[str, float]) -> None:
        """Count on from what an earlier part of the run spent."""
        self.tally = Counter({name: int(value) for name, value in spent.items() if name != "cost"})
        self.cost = spent.get("cost", 0.0)

    def stop(self) -> None:  # noqa: B027  (most judges have nothing to wait for)
        """Ask nothing more; calls under way end, and others raise JudgeError. For judges that wait for others."""


@dataclass(frozen=True)
class JudgeContext:
    """What a judge may need beside its settings."""

    logs: Path
    """Local folder for the logs of actors it starts."""
    keys: Mapping[str, SecretStr] = field(default_factory=dict)
    """API keys by the name of their environment variable."""
    reference_logps: Callable[[Sequence[tuple[Prompt, Completion]]], Awaitable[list[float]]] | None = None
    """Summed log-probs of completions under the reference, in nats."""


class JudgeBase(Settings):
    """Settings that every judge has."""

    @property
    def roles(self) -> list[Role]:
        """The actors the judge starts."""
        return []

    @property
    def key_names(self) -> set[str]:
        """Environment variables with the API keys it needs."""
        return set()

    @property
    def needs_reference(self) -> bool:
        """Whether it wants log-probs of the reference model."""
        return False

    def check_setup(self) -> None:
        """Refuse, before anything is started, a judge that could never work.

        Raises:
            ConfigError: says what is missing.
        """

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that it could never judge.

        Raises:
            DataError: names one by id.
        """

    def top_score(self, completions: int) -> float | None:
        """The highest score it can give one of so many completions, None if there is no such."""
        return None


async def all_ended(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all calls; raises the first error only when every call has ended, so that none that is paid for
    is cut off."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def collect_keys(judge: JudgeBase) -> dict[str, SecretStr]:
    """The judge's API keys from this process's environment.

    Raises:
        ConfigError: one is not set, or something else that the judge needs is missing.
    """
    judge.check_setup()
    missing = sorted(name for name in judge.key_names if not os.environ.get(name))
    if missing:
        raise ConfigError(f"judge: the environment variable {missing[0]} is not set; put the API key into it")
    return {name: SecretStr(os.environ[name]) for name in judge.key_names}
