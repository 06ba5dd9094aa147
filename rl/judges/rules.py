"""A judge of one's own: any Python function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cluster.errors import ConfigError, JudgeError
from rl.judges.base import Judge, JudgeBase, JudgeContext
from rl.judges.instructions import digest
from rl.types import Completion, Judgement, Prompt

Rule = Callable[[Prompt, Sequence[Completion]], Sequence[float | None]]
"""One score per completion, higher is better; None where the rule has nothing to say."""


class RulesSettings(JudgeBase):
    """A Python function that is given a prompt and its completions and returns a score, or None, for each."""

    kind: Literal["rules"]
    """Which judge."""
    function: str
    """Where it is: package.module:function."""

    def check_setup(self) -> None:
        """See `JudgeBase.check_setup`."""
        load_function(self.function)

    def build(self, context: JudgeContext) -> "RulesJudge":
        """The judge.

        Raises:
            ConfigError: there is no such function.
        """
        return RulesJudge(self.function, load_function(self.function))


class RulesJudge(Judge):
    """Asks the function."""

    def __init__(self, name: str, function: Rule):
        super().__init__()
        self.name = f"rules:{name}"
        self._function = function

    async def grade(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[Judgement]]:
        """See `Judge.grade`."""
        return [self._group(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]

    def _group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Judgement]:
        try:
            scores = list(self._function(prompt, completions))
            if len(scores) != len(completions):
                raise ValueError(f"{len(scores)} scores for {len(completions)} completions")
            scores = [None if score is None else float(score) for score in scores]
        except Exception as error:
            raise JudgeError(
                f"judge.function: {self.name} failed on prompt {prompt.id}: {type(error).__name__}: {error}"
            ) from error
        self.tally["calls"] += 1
        reasons = ["no rule applies" if score is None else "" for score in scores]
        hash = digest(self.name)[:12]
        return [Judgement(score, None, why, self.name, hash) for score, why in zip(scores, reasons, strict=True)]


def load_function(name: str) -> Any:
    """The function that `package.module:function` names.

    Raises:
        ConfigError: there is none.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"judge.function is {name!r}, but must be package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"judge.function: {name} cannot be imported ({error}); is its folder on the PYTHONPATH?"
        ) from error
    if not callable(function):
        raise ConfigError(f"judge.function: {name} is not a function")
    return function
